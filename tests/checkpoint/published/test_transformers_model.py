"""Our own code, never that of a directory, loads a model for evaluation, and all of the model from the directory."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from stagdist.checkpoint.published import transformers_model
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.transformers_model import load_with_transformers
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import CheckpointError
from tests.checkpoint.convert.test_llama_import import save_llama
from tests.checkpoint.published.test_exported_code import shape, write
from tests.reference import stagformer as reference


@pytest.mark.parametrize("variant", ["three sections with everything", "sequential"])
def test_a_directory_loads_and_code_in_it_is_never_run(tmp_path: Path, variant: str) -> None:
    model = shape(variant)
    parameters = write(tmp_path / "model", model)
    (tmp_path / "model" / "complete.json").unlink()  # the change is intended
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
    with pytest.raises(CheckpointError, match=r"model: model\.safetensors is missing"):
        load_with_transformers(tmp_path / "model")


def test_a_directory_whose_configuration_was_changed_is_not_loaded(tmp_path: Path) -> None:
    write(tmp_path / "model", shape("tied"))
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.5'))
    with pytest.raises(CheckpointError, match=r"model: config\.json has .* were written"):
        load_with_transformers(tmp_path / "model")


Change = Callable[[dict[str, Tensor]], object]
QUERIES, KEYS = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


def rewrite(folder: Path, change: Change) -> None:
    """Change the tensors of a directory."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def swap(tensors: dict[str, Tensor]) -> None:
    """Two tensors of one shape under each other's names."""
    tensors[QUERIES], tensors[KEYS] = tensors[KEYS], tensors[QUERIES]


def misshape(tensors: dict[str, Tensor]) -> None:
    """A tensor that is a row short."""
    tensors[QUERIES] = tensors[QUERIES][:-1].clone()


def add(tensors: dict[str, Tensor]) -> None:
    """A layer that the model does not have."""
    tensors["model.layers.9.self_attn.q_proj.weight"] = tensors[QUERIES].clone()


CHANGES: list[tuple[Change, str]] = [
    (lambda tensors: tensors.pop(QUERIES), r"lacks.*layers\.1\.self_attn\.q_proj\.weight"),
    (add, r"layers\.9\.self_attn\.q_proj\.weight"),
    (misshape, r"layers\.1\.self_attn\.q_proj\.weight"),
]


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "a Llama from elsewhere"])
@pytest.mark.parametrize(("change", "complaint"), CHANGES, ids=["missing", "extra", "misshapen"])
def test_weights_that_are_not_all_there_are_named(
    tmp_path: Path, change: Change, complaint: str, foreign: bool
) -> None:
    llama(tmp_path / "model", foreign)
    (tmp_path / "model" / "complete.json").unlink(missing_ok=True)
    rewrite(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=complaint):
        load_with_transformers(tmp_path / "model")


@pytest.mark.parametrize(("change", "complaint"), CHANGES, ids=["missing", "extra", "misshapen"])
def test_what_transformers_would_make_up_or_leave_out_is_refused_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, complaint: str
) -> None:
    """As if a difference between our reading of a directory and that of transformers had slipped through the check."""
    llama(tmp_path / "model", foreign=False)
    model = ModelReader(tmp_path / "model").model
    rewrite(tmp_path / "model", change)
    passing = SimpleNamespace(directory=tmp_path / "model", model=model, check=lambda: None)
    monkeypatch.setattr(transformers_model, "ModelReader", lambda _: passing)
    with pytest.raises(CheckpointError, match=complaint):
        load_with_transformers(tmp_path / "model")


def test_a_swapped_tensor_is_seen_by_its_sum(tmp_path: Path) -> None:
    llama(tmp_path / "model", foreign=False)
    rewrite(tmp_path / "model", swap)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other content than was written"):
        load_with_transformers(tmp_path / "model")


def test_a_changed_tokenizer_is_named(tmp_path: Path) -> None:
    llama(tmp_path / "model", foreign=False)
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has .* were written"):
        load_with_transformers(tmp_path / "model")


def test_weights_in_a_pickle_are_not_taken(tmp_path: Path) -> None:
    llama(tmp_path / "model", foreign=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"its weights are in pytorch_model\.bin; convert them"):
        load_with_transformers(tmp_path / "model")


def test_an_adapter_to_another_model_is_not_taken(tmp_path: Path) -> None:
    llama(tmp_path / "model", foreign=True)
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json, an adapter to another model; remove it"):
        load_with_transformers(tmp_path / "model")


def test_a_llama_from_elsewhere_loads_with_what_nobody_reads(tmp_path: Path) -> None:
    llama(tmp_path / "model", foreign=True)
    expected = load_file(tmp_path / "model" / "model.safetensors")
    rewrite(
        tmp_path / "model", lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    )
    loaded, _ = load_with_transformers(tmp_path / "model")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())


def llama(folder: Path, foreign: bool) -> None:
    """A sequential model's directory, or one without our records that has the byte tokenizer all the same."""
    if not foreign:
        write(folder, shape("sequential"))
        return
    save_llama(folder, {})
    byte_tokenizer().save(folder)
