"""A model directory read slice by slice: what a rank does not need is never loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from stagdist.checkpoint.model_directory import read_model_config, stored_name, weight_map
from stagdist.config import ModelConfig
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import ParameterSpec, model_parameters

_IGNORED_ENDINGS = ("rotary_emb.inv_freq",)
"""Tensors that old Llama directories carry and nobody reads."""

SINGLE_FILE = "model.safetensors"
"""Name of the weights where one file holds them all."""

ReadSlice = Callable[[ParameterSpec, int, int, int], Tensor]
"""Entries `start` to `stop` of dimension `dim` of a parameter: (spec, dim, start, stop) -> tensor on the CPU."""


class ModelReader:
    """An open model directory; its files are memory-mapped.

    Raises:
        CheckpointError: a file or tensor is missing, unknown, or of another shape than `config.json` asks, by name.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.model: ModelConfig = read_model_config(directory)
        self._files: dict[str, Any] = {}
        cut = _first_cut_tensor(self.directory / SINGLE_FILE)
        if cut is not None:
            raise CheckpointError(f"{self.directory / SINGLE_FILE} is cut off: it lacks the tensor {cut} and all after")
        self._where = dict(weight_map(self.directory))
        self._check()

    def read(self, spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
        """A slice of one parameter, in the dtype of the file."""
        view = self._slice(stored_name(spec.name, self.model))
        part: Tensor = view[(slice(None),) * dim + (slice(start, stop),)]
        return part

    def whole(self, spec: ParameterSpec) -> Tensor:
        """All of one parameter, in the dtype of the file."""
        return self.read(spec, 0, 0, spec.shape[0])

    def _slice(self, name: str) -> Any:
        return self._open(self._where[name], name).get_slice(name)

    def _open(self, file: str, name: str) -> Any:
        """The file that should hold the tensor `name`."""
        path = self.directory / file
        if file not in self._files:
            try:
                self._files[file] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.directory} lacks the tensor {name}: there is no {file}") from error
            except Exception as error:  # the library raises bare exceptions for damaged files
                if (cut := _first_cut_tensor(path)) is not None:
                    raise CheckpointError(f"{path} is cut off: it lacks the tensor {cut} and all after") from error
                raise CheckpointError(f"{path}, which should hold {name}, cannot be read: {error}") from error
        return self._files[file]

    def _check(self) -> None:
        expected = {stored_name(spec.name, self.model): spec for spec in model_parameters(self.model)}
        for name, spec in expected.items():
            if name not in self._where:
                raise CheckpointError(f"{self.directory} lacks the tensor {name}")
            if name not in self._open(self._where[name], name).keys():  # noqa: SIM118 - not a dict
                raise CheckpointError(f"{self.directory / self._where[name]} lacks the tensor {name} of the index")
            shape = tuple(self._slice(name).get_shape())
            if shape != spec.shape:
                file = self.directory / self._where[name]
                raise CheckpointError(f"{name} in {file} has shape {list(shape)}, config.json asks {list(spec.shape)}")
        tied_copy = {"lm_head.weight"} if self.model.tie_word_embeddings else set()
        unknown = [
            name
            for name in sorted(self._where)
            if name not in expected and name not in tied_copy and not name.endswith(_IGNORED_ENDINGS)
        ]
        if unknown:
            raise CheckpointError(
                f"{self.directory} holds tensors that a model of its config.json does not have: "
                f"{', '.join(unknown[:3])}{' and more' if len(unknown) > 3 else ''}"
            )


def _first_cut_tensor(path: Path) -> str | None:
    """The first tensor that reaches past the end of a safetensors file; None where the file is whole or is none."""
    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            room = path.stat().st_size - 8 - header_bytes
            if room < 0:
                return None
            header = json.loads(stream.read(header_bytes))
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
    cut = [name for name, end in ends.items() if end > room]
    return min(cut, key=ends.__getitem__) if cut else None
