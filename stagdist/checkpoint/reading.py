"""A model directory read slice by slice: what a rank does not need is never loaded."""

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
        self._where = dict(weight_map(self.directory))
        self._check()

    def read(self, spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
        """A slice of one parameter, in the dtype of the file."""
        view = self._slice(stored_name(spec.name, self.model))
        part: Tensor = view[(slice(None),) * dim + (slice(start, stop),)]
        return part

    def _slice(self, name: str) -> Any:
        return self._open(self._where[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.directory / file, framework="pt")
            except Exception as error:  # the library raises bare exceptions for damaged files
                raise CheckpointError(f"{self.directory / file} cannot be read: {error}") from error
        return self._files[file]

    def _check(self) -> None:
        expected = {stored_name(spec.name, self.model): spec for spec in model_parameters(self.model)}
        for name, spec in expected.items():
            if name not in self._where:
                raise CheckpointError(f"{self.directory} lacks the tensor {name}")
            if name not in self._open(self._where[name]).keys():  # noqa: SIM118 - not a dict
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
