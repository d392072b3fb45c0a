"""Small model directories of random weights, as one file or as two with an index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stagdist.checkpoint.complete import COMPLETE
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.config.parts import ModelConfig
from stagdist.parallel.layout import model_parameters
from tests.reference import stagformer as reference
from tests.reference.variants import BASE

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LLAMA = {"connection": "sequential"}


def write(directory: Path, keys: dict[str, Any], *, recorded: bool = False) -> tuple[ModelConfig, reference.Parameters]:
    """A directory of random weights; without `complete.json`, as those of other programs, unless it is `recorded`."""
    model = ModelConfig(**BASE | keys)
    parameters = reference.random_parameters(model, perturb=True)
    with ModelDirectoryWriter(directory, model, torch.float32, end_of_document=0) as writer:
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
    if not recorded:
        (directory / COMPLETE).unlink()
    return model, parameters


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the tensors of a directory with one file."""
    tensors = load_file(directory / FILE)
    edit(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


def split(directory: Path) -> dict[str, str]:
    """Make two files and an index out of one file; the index."""
    tensors = load_file(directory / FILE)
    (directory / FILE).unlink()
    where = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in where if where[name] == file}, directory / file)
    write_index(directory, where)
    return where


def write_index(directory: Path, where: dict[str, str]) -> None:
    """The index of a directory of several files."""
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
