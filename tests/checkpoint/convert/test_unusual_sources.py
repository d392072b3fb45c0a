"""Sources of a conversion that programs leave on disk: byte order marks, parts of downloads, bad numbers, other ids."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tools.convert_checkpoint
from tests.checkpoint.convert.test_llama_import import save_llama
from tests.checkpoint.synthetic import complete, training_checkpoint
from tests.fuzz.mutations import run_main

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def marked(name: str) -> Callable[[Path], None]:
    """Put a byte order mark before a file, which is made if it is not there."""

    def change(folder: Path) -> None:
        path = folder / name
        if name == INDEX:
            path.write_text('{"weight_map": {}}')
            (folder / WEIGHTS).unlink()
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    return change


def not_finite(folder: Path) -> None:
    """One weight is NaN."""
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def without_head(folder: Path) -> None:
    """The weights of a LlamaModel: names without prefix, and no head."""
    weights = load_file(folder / WEIGHTS)
    weights.pop("lm_head.weight")
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (marked("config.json"), "config.json cannot be read: Unexpected UTF-8 BOM"),
        (marked("generation_config.json"), "save it as UTF-8 without a byte order mark"),
        (marked(INDEX), "save it as UTF-8 without a byte order mark"),
        (lambda folder: (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.part"), "its download did not finish"),
        (lambda folder: (folder / WEIGHTS).write_text('{"error":"not found"}'), "get the file from its source again"),
        (not_finite, "output_norm.weight in"),
        (without_head, "save the causal language model with transformers again"),
    ],
)
def test_an_unusual_directory_is_refused_with_a_remedy(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    llama = tmp_path / "llama"
    save_llama(llama, {})
    change(llama)
    commands: list[list[object]] = [
        ["import", llama, tmp_path / "run", "--tokenizer", "bytes"],
        ["upcycle", llama, tmp_path / "new", "--section-layers", 1, 2, "--tokenizer", "bytes"],
    ]
    for command in commands:
        outcome = run_main(tools.convert_checkpoint.main, *command, "--quiet")
        outcome.assert_refused("llama", said)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_special_tokens_of_a_checkpoint_beyond_the_rows_are_refused(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", {})
    path = folder / "state.json"
    tokens = {"config": {"eos_token_id": 9999}, "generation": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_tokens": tokens}))
    complete(folder)
    command = ["export", tmp_path / "run", tmp_path / "model", "--tokenizer", "bytes", "--quiet"]
    run_main(tools.convert_checkpoint.main, *command).assert_refused("state.json", "eos_token_id has 9999")
    assert run_main(tools.convert_checkpoint.main, "inspect", tmp_path / "run").code == 1


def test_inspect_compares_the_ids_of_a_checkpoint_with_its_rows(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {"vocab_size": 200})
    outcome = run_main(tools.convert_checkpoint.main, "inspect", tmp_path / "run", "--quiet")
    assert outcome.code == 1 and "PROBLEM: the tokenizer bytes gives text or its end ids up to" in outcome.output
