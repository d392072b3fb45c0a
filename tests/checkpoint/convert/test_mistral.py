"""A Mistral whose window hides nothing is a Llama, with the defaults of its own configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stagdist.checkpoint.convert.find import open_model
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.proof import plain_logits, reader
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.upcycle import upcycle
from stagdist.checkpoint.published.transformers_model import load_with_transformers
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import CheckpointError
from tests.checkpoint.convert.test_llama_import import rewrite
from tests.ranks import ROOT, run_script

IDS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))


def save_mistral(folder: Path, keys: dict[str, Any]) -> Any:
    """A random Mistral with uneven norms and the bytes tokenizer, as `transformers` writes it."""
    torch.manual_seed(5)
    config = MistralConfig(
        **{
            "vocab_size": 257, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 8, "max_position_embeddings": 64, "sliding_window": None, "bos_token_id": None,
            "eos_token_id": 256, **keys,
        }
    )  # fmt: skip
    mistral = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in mistral.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    mistral.save_pretrained(folder)
    byte_tokenizer().save(folder)
    return mistral


@pytest.mark.parametrize(
    ("keys", "drop"),
    [
        ({}, ()),
        ({"sliding_window": 64}, ()),
        ({"sliding_window": 4096}, ("sliding_window",)),
        ({"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}, ()),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-3}, ()),
        ({"max_position_embeddings": 131072}, ("max_position_embeddings",)),
        ({}, ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "head_dim", "tie_word_embeddings")),
    ],
    ids=str,
)
def test_a_mistral_without_a_window_computes_what_transformers_computes(
    tmp_path: Path, keys: dict[str, Any], drop: tuple[str, ...]
) -> None:
    save_mistral(tmp_path / "mistral", keys)
    rewrite(tmp_path / "mistral", drop, {})
    mistral = AutoModelForCausalLM.from_pretrained(tmp_path / "mistral", dtype=torch.float32)
    assert isinstance(mistral, MistralForCausalLM)
    with torch.no_grad():
        expected = mistral(IDS).logits
    source = open_model(tmp_path / "mistral")
    assert source.model.max_position_embeddings == mistral.config.max_position_embeddings
    torch.testing.assert_close(plain_logits(source.model, reader(source), IDS), expected, atol=2e-5, rtol=0)
    import_model(tmp_path / "mistral", tmp_path / "run", None, ConversionOptions())
    export(tmp_path / "run", tmp_path / "llama", ConversionOptions())
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert isinstance(llama, LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(llama(IDS).logits, expected, atol=1e-5, rtol=0)
        loaded, _ = load_with_transformers(tmp_path / "mistral", torch.float32)
        assert torch.equal(loaded(IDS).logits, expected)


def test_a_window_that_reaches_over_the_context_hides_nothing(tmp_path: Path) -> None:
    """At every position that the model has, transformers computes the same with such a window and without."""
    with_window = save_mistral(tmp_path / "with", {"sliding_window": 64})
    ids = torch.randint(0, 257, (1, 64), generator=torch.Generator().manual_seed(2))
    without = MistralForCausalLM.from_pretrained(tmp_path / "with", sliding_window=None)
    narrower = MistralForCausalLM.from_pretrained(tmp_path / "with", sliding_window=63)
    with torch.no_grad():
        expected = without(ids).logits
        assert torch.equal(with_window(ids).logits, expected)
        assert not torch.equal(narrower(ids).logits, expected)


def test_it_is_upcycled_and_decoded(tmp_path: Path) -> None:
    mistral = save_mistral(tmp_path / "mistral", {})
    with torch.no_grad():
        expected = mistral.generate(torch.tensor([list(b"to be")]), max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    words = ("--prompt", "to be", "--temperature", "0", "--json", "--max-new-tokens", "8")
    done = run_script(ROOT / "launch" / "generate.py", "--model", tmp_path / "mistral", *words)
    assert json.loads(done.stdout)["token_ids"] == expected, done.stderr
    upcycle(tmp_path / "mistral", tmp_path / "stag", (1, 1), ConversionOptions(), output_scale=0.0)
    done = run_script(ROOT / "launch" / "generate.py", "--model", tmp_path / "stag", *words)
    assert done.returncode == 0 and json.loads(done.stdout)["finish_reason"] in ("length", "stop"), done.stderr


@pytest.mark.parametrize(
    ("keys", "drop", "window"),
    [
        ({"sliding_window": 63}, (), 63),
        ({"sliding_window": 8}, (), 8),
        ({"max_position_embeddings": 8192}, ("sliding_window",), 4096),
    ],
)
def test_a_window_is_refused_and_the_remedy_works(
    tmp_path: Path, keys: dict[str, Any], drop: tuple[str, ...], window: int
) -> None:
    save_mistral(tmp_path / "mistral", keys)
    rewrite(tmp_path / "mistral", drop, {})
    with pytest.raises(CheckpointError, match=f"sliding_window is {window}; .*set max_position_embeddings to {window}"):
        open_model(tmp_path / "mistral")
    rewrite(tmp_path / "mistral", (), {"max_position_embeddings": window})
    assert open_model(tmp_path / "mistral").model.max_position_embeddings == window


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen2", "biases or norms of queries and keys"),
        ("qwen3", "biases or norms of queries and keys"),
        ("gemma2", "scaled embeddings"),
        ("phi3", "fused projections"),
        ("mixtral", "experts"),
        ("gpt2", "another architecture"),
        (None, "another architecture"),
    ],
)
def test_other_families_are_refused_with_the_reason(tmp_path: Path, kind: str | None, reason: str) -> None:
    save_mistral(tmp_path / "mistral", {})
    rewrite(tmp_path / "mistral", (), {"model_type": kind})
    with pytest.raises(CheckpointError, match=f"model_type {kind!r}; stagformer, llama and mistral are read.*{reason}"):
        open_model(tmp_path / "mistral")
