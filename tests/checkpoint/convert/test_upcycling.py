"""A Llama becomes a StagFormer by stated rules."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagdist.checkpoint.convert.find import open_model
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.upcycle import upcycle
from stagdist.errors import CheckpointError, ConfigError
from tests.checkpoint.convert.test_llama_import import save_llama
from tests.checkpoint.synthetic import model_directory, training_checkpoint

LLAMA = {"connection": "sequential", "section_layers": [1, 3]}


def test_every_tensor_follows_its_rule(tmp_path: Path) -> None:
    llama = model_directory(tmp_path / "llama", LLAMA)
    folder = upcycle(llama, tmp_path / "new", [2, 2], ConversionOptions(), output_scale=0.5).directory
    model = open_model(folder).model
    assert model.staggered and model.section_layers == (2, 2) and model.cross_key_value_heads == 2
    old, new = load_file(llama / "model.safetensors"), load_file(folder / "model.safetensors")

    def same(name: str, llama_name: str, scale: float = 1.0) -> None:
        torch.testing.assert_close(new.pop(name), old[llama_name] * scale, atol=0, rtol=0)

    same("embedding.weight", "model.embed_tokens.weight")
    same("output_norm.weight", "model.norm.weight")
    same("head.weight", "lm_head.weight")
    for index in range(4):
        ours, theirs = f"sections.{index // 2}.layers.{index % 2}.", f"model.layers.{index}."
        same(ours + "self_attention_norm.weight", theirs + "input_layernorm.weight")
        same(ours + "mlp_norm.weight", theirs + "post_attention_layernorm.weight")
        for part in ("gate", "up", "down"):
            same(f"{ours}mlp.{part}_proj.weight", f"{theirs}mlp.{part}_proj.weight")
        for part in "qkvo":
            same(f"{ours}self_attention.{part}_proj.weight", f"{theirs}self_attn.{part}_proj.weight")
            if index >= 2:
                scale = 0.5 if part == "o" else 1.0
                same(f"{ours}cross_attention.{part}_proj.weight", f"{theirs}self_attn.{part}_proj.weight", scale)
        if index >= 2:
            same(ours + "cross_attention_norm.weight", theirs + "input_layernorm.weight")
    same("sections.1.memory_norm.weight", "model.layers.2.input_layernorm.weight")
    assert not new.pop("sections.1.null_memory").any()
    assert not new, f"no rule was checked for {sorted(new)}"


def test_a_llama_of_transformers_and_a_sequential_run_are_taken(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama", {"num_key_value_heads": 2, "num_hidden_layers": 4})
    proof = upcycle(tmp_path / "llama", tmp_path / "a", [2, 2], ConversionOptions(tokenizer="bytes"), output_scale=1.0)
    assert "logits" in proof.checked
    training_checkpoint(tmp_path / "run", LLAMA, (2, 1, 1), "bf16")
    folder = upcycle(tmp_path / "run", tmp_path / "b", [1, 1, 2], ConversionOptions(), output_scale=1.0).directory
    assert open_model(folder).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "layers", "complaint"),
    [
        (LLAMA, [2, 3], "has 4 layers"),
        (LLAMA, [4], "two numbers or more"),
        (LLAMA, [4, 0], "each at least 1"),
        (LLAMA, [5, -1], "each at least 1"),
        ({}, [2, 2], "StagFormer already"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(
    tmp_path: Path, model: dict[str, Any], layers: list[int], complaint: str
) -> None:
    source = model_directory(tmp_path / "source", model)
    with pytest.raises(CheckpointError, match=complaint):
        upcycle(source, tmp_path / "new", layers, ConversionOptions(), output_scale=1.0)
    with pytest.raises(CheckpointError, match="model directory"):
        export(source, tmp_path / "new", ConversionOptions())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, scale: float) -> None:
    source = model_directory(tmp_path / "source", LLAMA)
    with pytest.raises(ConfigError, match=re.escape(f"--output-scale is {scale}")):
        upcycle(source, tmp_path / "new", [2, 2], ConversionOptions(), output_scale=scale)
    assert not (tmp_path / "new").exists()


def test_the_tokens_of_a_llama_go_along(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source", LLAMA)
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4}
    body = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(body | tokens))
    (source / "complete.json").unlink()  # the change is intended
    (source / "generation_config.json").write_text(json.dumps(tokens | {"temperature": 0.6}))
    folder = upcycle(source, tmp_path / "new", [2, 2], ConversionOptions(), output_scale=0.0).directory
    body = json.loads((folder / "config.json").read_text())
    assert {key: body[key] for key in tokens} == tokens
    assert json.loads((folder / "generation_config.json").read_text()) == tokens | {"temperature": 0.6}


def test_a_destination_that_exists_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists; choose another destination"):
        upcycle(tmp_path / "nothing here", taken, [2, 2], ConversionOptions(), output_scale=0.0)
