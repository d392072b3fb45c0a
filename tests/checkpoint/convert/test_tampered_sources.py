"""A source that was changed after it was written is refused, and no code in it runs."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.errors import CheckpointError
from stagdist.parallel.grid import Grid
from tests.checkpoint.synthetic import (
    complete,
    model_directory,
    training_checkpoint,
)

OPTIONS = ConversionOptions()


def swap(folder: Path) -> None:
    """Two tensors of one shape change places."""
    tensors = load_file(folder / "model.safetensors")
    k, v = (f"sections.0.layers.0.self_attention.{name}_proj.weight" for name in "kv")
    tensors[k], tensors[v] = tensors[v], tensors[k]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_dtype(folder: Path) -> None:
    """One tensor is stored in another type."""
    tensors = load_file(folder / "model.safetensors")
    tensors["output_norm.weight"] = tensors["output_norm.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_tensor(folder: Path) -> None:
    """A tensor that the model does not have."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def drop_shard(folder: Path) -> None:
    """The weights are gone."""
    (folder / "model.safetensors").unlink()


def truncate(folder: Path) -> None:
    """The end of the weights is gone."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_config(folder: Path) -> None:
    """The configuration is of another model."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 32}))


def other_rule(folder: Path) -> None:
    """The same shapes, another function."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stagger": 2}))


def other_layers(folder: Path) -> None:
    """The number of layers contradicts the sections."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 7}))


def two_bases(folder: Path) -> None:
    """The base of the rotary angles stands there twice, differently."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5.0}))


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (swap, r"self_attention\.k_proj\.weight in .* other values"),
        (change_dtype, r"1 bfloat16 such as output_norm\.weight, but tensors of one type are read"),
        (add_tensor, r"extra\.weight"),
        (drop_shard, r"model\.safetensors"),
        (truncate, r"lacks the tensor|cannot be read"),
        (other_config, r"gate_proj\.weight in .* has shape \[24, 16\]"),
        (other_rule, r"config\.json says stagger 2, the weights were written for 1 \(checksums\.json\)"),
        (other_layers, r"config\.json says num_hidden_layers 7 and section_layers \[\d, \d\], which are \d"),
        (two_bases, r"config\.json says rope_theta 5\.0 and in rope_parameters 5000\.0"),
    ],
)
def test_a_model_directory_that_was_tampered_with_is_refused(
    tmp_path: Path, tamper: Callable[[Path], None], complaint: str
) -> None:
    folder = model_directory(tmp_path / "model", {})
    tamper(folder)
    with pytest.raises(CheckpointError, match=complaint):
        import_model(folder, tmp_path / "run", None, OPTIONS)
    assert not (tmp_path / "run").exists()
    assert any(tamper.__name__ and problem for problem in inspect(folder).problems)


def test_a_training_checkpoint_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (2, 2, 1))
    victim = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    original = victim.read_bytes()

    victim.write_bytes(original[:-50])
    with pytest.raises(CheckpointError, match=victim.name):
        export(tmp_path / "run", tmp_path / "model", OPTIONS)
    complete(folder)  # the records agree with the damage now
    with pytest.raises(CheckpointError, match=victim.name):
        export(tmp_path / "run", tmp_path / "model", OPTIONS)

    content = torch.load(folder / "layer_01-model_00-model_states.pt")
    k, v = (f"section.core.0.self_attention.{name}_proj.weight" for name in "kv")
    content[k], content[v] = content[v], content[k]
    victim.write_bytes(original)
    torch.save(content, folder / "layer_01-model_00-model_states.pt")
    complete(folder)
    with pytest.raises(CheckpointError, match=r"fp32 copy of sections\.0\.layers\.0\.self_attention\.k_proj\.weight"):
        export(tmp_path / "run", tmp_path / "model", OPTIONS)
    del content[k]
    torch.save(content, folder / "layer_01-model_00-model_states.pt")
    complete(folder)
    with pytest.raises(CheckpointError, match=rf"lacks the tensor {k}"):
        reshard(tmp_path / "run", tmp_path / "other", Grid(1, 1, 1), OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


class Bomb:
    """Runs a program when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_checkpoint_from_a_stranger_runs_no_code_unless_trusted(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path)
    torch.save(content | {"client": Bomb(tmp_path / "ran")}, path)
    complete(folder)
    with pytest.raises(CheckpointError, match=r"mp_rank_00.* would run .*--trust-pickle.* clean copy$"):
        export(tmp_path / "run", tmp_path / "model", OPTIONS)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model").exists()
    clean = reshard(tmp_path / "run", tmp_path / "clean", Grid(1, 1, 1), ConversionOptions(trust_pickle=True)).directory
    assert (tmp_path / "ran").exists()
    export(clean, tmp_path / "model", OPTIONS)
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran twice")))
    complete(folder)
    with pytest.raises(CheckpointError, match="mp_rank_00"):
        export(tmp_path / "run", tmp_path / "second", OPTIONS)
    assert not (tmp_path / "ran twice").exists()
