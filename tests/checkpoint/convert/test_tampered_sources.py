"""A source that was changed after it was written is refused, and no code in it runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.verify import verify
from stagdist.errors import CheckpointError
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
        (swap, ""),
        (change_dtype, r"1 bfloat16 such as output_norm\.weight, but tensors of one type are read"),
        (add_tensor, r"extra\.weight"),
        (drop_shard, r"model\.safetensors"),
        (truncate, "cannot be read"),
        (other_config, r"gate_proj\.weight in .* has shape \[24, 16\]"),
        (other_rule, ""),
        (other_layers, r"config\.json says num_hidden_layers 7 and section_layers \[\d, \d\], which are \d"),
        (two_bases, r"config\.json says rope_theta 5\.0 and in rope_parameters 5000\.0"),
    ],
)
def test_a_model_directory_that_was_tampered_with_is_refused(
    tmp_path: Path, tamper: Callable[[Path], None], complaint: str
) -> None:
    folder = model_directory(tmp_path / "model", {})
    tamper(folder)
    with pytest.raises(CheckpointError, match=r"model: (model\.saf|config\.j).* (has|is) .*; get the"):
        import_model(folder, tmp_path / "run", None, OPTIONS)
    assert inspect(folder).problems
    (folder / "complete.json").unlink()  # what is left to find without a record
    if complaint == "":
        return
    with pytest.raises(CheckpointError, match=complaint):
        import_model(folder, tmp_path / "run", None, OPTIONS)
    assert not (tmp_path / "run").exists()
    assert inspect(folder).problems


def cut(path: Path) -> None:
    """The end of a file is gone."""
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    """One bit of the last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(("tamper", "said"), [(cut, r"has \d+ bytes"), (flip, "has other"), (Path.unlink, "is")])
@pytest.mark.parametrize("name", ["part_00003.safetensors", "index.json", "state.json", "config.yaml"])
def test_a_training_checkpoint_that_was_tampered_with_is_refused(
    tmp_path: Path, name: str, tamper: Callable[[Path], None], said: str
) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (2, 2, 1))
    tamper(folder / name)
    for convert in (
        lambda: export(tmp_path / "run", tmp_path / "model", OPTIONS),
        lambda: verify(tmp_path / "run", tmp_path / "run"),
    ):
        with pytest.raises(CheckpointError, match=rf"step_00000007.*{name} {said}"):
            convert()
    assert any(name in problem for problem in inspect(folder).problems)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_files_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    folder, other = (training_checkpoint(tmp_path / f"run-{seed}", {}, (2, 1, 1), seed=seed) for seed in (1, 2))
    shutil.copyfile(other / "part_00001.safetensors", folder / "part_00001.safetensors")
    with pytest.raises(CheckpointError, match=r"part_00001\.safetensors has other content than was written; use an"):
        export(folder, tmp_path / "model", OPTIONS)
    complete(folder)  # the records agree with the files, which are of one shape: nothing is wrong any more
    export(folder, tmp_path / "model", OPTIONS)


def test_tensors_that_the_index_does_not_describe_are_refused(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    tensors = load_file(folder / "part_00000.safetensors")
    del tensors["output_norm.weight.value"]
    save_file(tensors, folder / "part_00000.safetensors")
    complete(folder)
    with pytest.raises(CheckpointError, match=r"part_00000\.safetensors: output_norm\.weight\.value cannot be read"):
        export(folder, tmp_path / "model", OPTIONS)
