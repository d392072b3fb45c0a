"""Our own code, never that of a directory, loads a model for evaluation."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from stagdist.checkpoint.transformers_model import load_with_transformers
from stagdist.config import ModelConfig
from stagdist.errors import CheckpointError
from tests.checkpoint.test_exported_code import shape, write
from tests.reference import stagformer as reference


@pytest.mark.parametrize("variant", ["three sections with everything", "sequential"])
def test_a_directory_loads_and_code_in_it_is_never_run(tmp_path: Path, variant: str) -> None:
    model = shape(variant)
    parameters = write(tmp_path / "model", model)
    for name in ("configuration_stagformer.py", "modeling_stagformer.py"):
        (tmp_path / "model" / name).write_text("raise SystemExit('a stranger ran')\n")
    loaded, tokenizer = load_with_transformers(tmp_path / "model", torch.float32)
    ids = tokenizer("to be", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"to be")] and not loaded.training
    with torch.no_grad():
        expected = reference.forward(parameters, model, ids)
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)


def test_heads_that_do_not_divide_the_width_load_in_a_stagformer_but_not_in_a_llama(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6}
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        LlamaConfig(hidden_size=16, num_attention_heads=3, head_dim=6)
    model = ModelConfig(**shape("tied").model_dump() | heads)
    parameters = write(tmp_path / "model", model)
    loaded, _ = load_with_transformers(tmp_path / "model", torch.float32)
    ids = torch.tensor([list(b"to be")])
    with torch.no_grad():
        expected = reference.forward(parameters, model, ids)
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a sequential model is exported as a Llama"):
        ModelConfig(**model.model_dump() | {"connection": "sequential"})


def test_a_directory_that_does_not_load_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", shape("tied"))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*model"):
        load_with_transformers(tmp_path / "model")


def test_a_directory_whose_configuration_was_changed_is_not_loaded(tmp_path: Path) -> None:
    write(tmp_path / "model", shape("tied"))
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.5'))
    with pytest.raises(CheckpointError, match=r"rms_norm_eps 0\.5, the weights were written for"):
        load_with_transformers(tmp_path / "model")
