"""`verify` calls two models the same only where text and configurations say so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stagdist.checkpoint.convert.model_conversions import split
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.verify import unsettled_keys, verify
from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError
from tests.checkpoint.convert.test_convert_tool import run
from tests.checkpoint.synthetic import SHAPE, model_directory

CONTEXT = {"max_position_embeddings": 256}
STRETCHED = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64}}
NOT_STRETCHED = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 10**9}}
SEQUENTIAL = {"connection": "sequential"}

TOLD_APART: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (CONTEXT, CONTEXT | {"cross_attention_window": 128}, ["cross_attention_window"]),
    (CONTEXT | {"cross_attention_window": 130}, CONTEXT | {"cross_attention_window": 200}, ["cross_attention_window"]),
    ({}, {"rms_norm_eps": 1.000001e-5}, ["rms_norm_eps"]),
    (CONTEXT | {"rope_theta": 5000.0}, CONTEXT | {"rope_theta": 5000.01}, ["rope_theta"]),
    (CONTEXT, CONTEXT | STRETCHED | {"rope_theta": 5000.0}, [
        "rope_scaling.rope_type", "rope_scaling.factor", "rope_scaling.low_freq_factor",
        "rope_scaling.high_freq_factor", "rope_scaling.original_max_position_embeddings"]),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "keys"), TOLD_APART, ids=str)
def test_keys_that_a_short_text_may_not_show_make_two_functions(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], keys: list[str]
) -> None:
    verdict = verify(model_directory(tmp_path / "a", one), model_directory(tmp_path / "b", other))
    assert not verdict.same(1e-5) and sorted(verdict.unsettled) == sorted(keys)
    assert set(keys) <= set(verdict.differing_keys)
    if "rope_scaling.factor" not in keys:
        assert verdict.largest_difference <= 1e-5, "the logits alone did not tell them apart"


SAME: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (CONTEXT, {"max_position_embeddings": 64}, ["max_position_embeddings"]),
    ({}, {"cross_attention_window": 32}, ["cross_attention_window"]),
    (CONTEXT | {"cross_attention_window": 64}, {"max_position_embeddings": 64},
     ["cross_attention_window", "max_position_embeddings"]),
    ({}, {"head_dim": 4, "num_key_value_heads": 2, "cross_attention_key_value_heads": 2}, []),
    (CONTEXT, CONTEXT | NOT_STRETCHED, [
        "rope_scaling.rope_type", "rope_scaling.factor", "rope_scaling.low_freq_factor",
        "rope_scaling.high_freq_factor", "rope_scaling.original_max_position_embeddings"]),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "keys"), SAME, ids=str)
def test_keys_that_change_nothing_where_both_can_read_are_told_only(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], keys: list[str]
) -> None:
    verdict = verify(model_directory(tmp_path / "a", one), model_directory(tmp_path / "b", other))
    assert verdict.same(1e-5) and not verdict.unsettled
    assert sorted(verdict.differing_keys) == sorted(keys) == sorted(line.split()[0] for line in verdict.remarks())


def rewrite(folder: Path, keys: dict[str, Any]) -> None:
    """Say something else in `config.json`, with no sums to contradict it."""
    (folder / "complete.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_the_same_function_stored_otherwise_is_the_same(tmp_path: Path) -> None:
    shared = model_directory(tmp_path / "shared", {"share_section_weights": True})
    verdict = verify(shared, split(shared, tmp_path / "separate", ConversionOptions()).directory)
    assert verdict.same(0.0) and list(verdict.differing_keys) == ["share_section_weights"]

    cut = model_directory(tmp_path / "cut", SEQUENTIAL)
    shutil.copytree(cut, tmp_path / "cut otherwise")
    rewrite(tmp_path / "cut otherwise", {"section_layers": [1, 3]})
    verdict = verify(cut, tmp_path / "cut otherwise")
    assert verdict.same(0.0) and verdict.differing_keys == {"section_layers": ((2, 2), (1, 3))}

    tied = model_directory(tmp_path / "tied", {"tie_word_embeddings": True})
    shutil.copytree(tied, tmp_path / "untied")
    rewrite(tmp_path / "untied", {"tie_word_embeddings": False})
    tensors = load_file(tmp_path / "untied" / "model.safetensors")
    copied = tensors | {"head.weight": tensors["embedding.weight"].clone()}
    save_file(copied, tmp_path / "untied" / "model.safetensors", metadata={"format": "pt"})
    verdict = verify(tied, tmp_path / "untied")
    assert verdict.same(0.0) and list(verdict.differing_keys) == ["tie_word_embeddings"]


def test_more_of_the_text_shows_what_the_beginning_does_not(tmp_path: Path) -> None:
    one = model_directory(tmp_path / "a", CONTEXT)
    other = model_directory(tmp_path / "b", CONTEXT | {"cross_attention_window": 200})
    short, long = (verify(one, other, tokens=tokens) for tokens in (200, 256))
    assert (short.tokens, short.largest_difference, short.unsettled) == (200, 0.0, {"cross_attention_window": 256})
    assert long.tokens == 256 and long.largest_difference > 1e-5 and not long.unsettled
    whole = verify(one, one, tokens=256)
    assert whole.same(0.0) and whole.tokens == 256


@pytest.mark.parametrize(
    ("tokens", "text", "complaint"),
    [
        (0, "x", "--tokens is 0; the context of both models has 32, give 1 to that many"),
        (33, "x" * 50, "--tokens is 33; the context"),
        (32, "too short", "the text has 9 tokens, --tokens asks for 32; name a longer --text"),
    ],
)
def test_tokens_that_are_not_there_are_refused(tmp_path: Path, tokens: int, text: str, complaint: str) -> None:
    folder = model_directory(tmp_path / "a", {})
    with pytest.raises(ConfigError, match=complaint):
        verify(folder, folder, tokens=tokens, text=text)


def test_a_whole_context_that_was_read_settles_window_and_wavelengths() -> None:
    one = ModelConfig(**SHAPE)
    other = ModelConfig(**SHAPE | {"cross_attention_window": 8, "rope_theta": 4000.0, "rms_norm_eps": 1e-6})
    late: dict[str, int | None] = {"cross_attention_window": 32, "rope_theta": 32}
    assert unsettled_keys(one, other, 31) == late | {"rms_norm_eps": None}
    assert unsettled_keys(one, other, 32) == {"rms_norm_eps": None}
    assert unsettled_keys(one, one, 1) == {}


def test_the_tool_tells_the_keys_and_how_much_to_read(tmp_path: Path) -> None:
    one = model_directory(tmp_path / "a", CONTEXT)
    other = model_directory(tmp_path / "b", CONTEXT | {"cross_attention_window": 200})
    told = run("verify", one, other)
    assert told.returncode == 1 and told.stdout.startswith("DIFFERENT: largest difference of a logit 0 on 128 tokens")
    assert told.stdout.splitlines()[1] == (
        "cross_attention_window is None in the first and 200 in the second: another function, which 128 tokens may "
        "not show; --tokens 256 reads all"
    )
    body = json.loads(run("verify", one, other, "--tokens", "150", "--json").stdout)
    assert (body["same"], body["tokens"], body["largest_difference"]) == (False, 150, 0.0)
    assert body["differing_keys"] == {"cross_attention_window": [None, 200]}
    assert body["unsettled"] == {"cross_attention_window": 256}
    refused = run("verify", one, other, "--tokens", "257")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --tokens is 257; the context of both")
