"""Read a training checkpoint of any grid: global tensors under canonical names, or any part of them.

Files are memory-mapped, so only the bytes that are asked for are read.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagdist.checkpoint.complete import RunningHashes, read_complete
from stagdist.checkpoint.text_tokens import TextTokens, check_tokens
from stagdist.checkpoint.training.directory import CONFIG, STATE, TrainingState, read_state
from stagdist.checkpoint.training.index import (
    MOMENTS,
    VALUE,
    Box,
    CheckpointIndex,
    Fragment,
    Rectangle,
    intersection,
    read_index,
    rectangles,
)
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError
from stagdist.model.precision import DTYPES
from stagdist.parallel.layout import ParameterSpec, model_parameters

_ROUNDED = 1 << 22
"""Values that are rounded to the precision of the run at a time."""


class TrainingReader:
    """An open training checkpoint.

    Args:
        hashing: hash files while tensors are read, so that `check` reads only the rest.

    Attributes:
        dtype: of the weights that the run computes with; derived from the stored fp32 values.
        tokens: special tokens of the model directory that the run started from; None if there was none.
        bytes_read: bytes of fragments that were copied so far.

    Raises:
        CheckpointError: configuration, state or index is missing or damaged, or they contradict each other.
    """

    def __init__(self, directory: str | Path, *, hashing: bool = False):
        self.directory = Path(directory)
        self._hashes = RunningHashes(self.directory, read_complete(self.directory)) if hashing else None
        self.config: RunConfig = load_config(self.directory / CONFIG)
        self.state: TrainingState = read_state(self.directory)
        self.index: CheckpointIndex = read_index(self.directory)
        self.model: ModelConfig = self.config.model
        if problem := self.index.problem(model_parameters(self.model)):
            raise CheckpointError(f"{self.directory}: the index does not fit config.yaml: {problem}")
        if (self.state.optimizer_steps > 0) != (MOMENTS[0] in self.index.kinds):
            raise CheckpointError(
                f"{self.directory}: {STATE} says optimizer_steps {self.state.optimizer_steps}, but the index has the "
                f"kinds {list(self.index.kinds)}; moments are stored from the first step on"
            )
        self.tokens: TextTokens | None = self.state.text_tokens
        for part, held in vars(self.tokens).items() if self.tokens else ():
            check_tokens(held, f"{self.directory / STATE}: text_tokens.{part}", self.model.vocab_size)
        self.dtype = DTYPES[self.config.training.precision]
        self.bytes_read = 0
        self._files: dict[str, safe_open] = {}

    def weight(self, spec: ParameterSpec) -> Tensor:
        """A global parameter in the dtype of the run."""
        if self.dtype == torch.float32 or len(self.index.tensors[spec.name].fragments) == 1:
            return self.value(spec).to(self.dtype)
        out, box = torch.empty(spec.shape, dtype=self.dtype), tuple((0, size) for size in spec.shape)
        for start in range(0, spec.numel, _ROUNDED):  # fp32 values of a part at a time
            part = torch.zeros(min(_ROUNDED, spec.numel - start))
            self.fill(part, spec.name, VALUE, box, start)
            out.view(-1)[start : start + len(part)] = part
        return out

    def check(self) -> None:
        """Compare all files with their records.

        Raises:
            CheckpointError: a file differs; the message names it.
        """
        hashes = self._hashes or RunningHashes(self.directory, read_complete(self.directory))
        if reason := hashes.damage():
            raise CheckpointError(f"{self.directory}: {reason}; use an earlier checkpoint")

    def value(self, spec: ParameterSpec, kind: str = VALUE) -> Tensor:
        """A global tensor, fp32; `kind` is one of `KINDS`. Moments that are not stored are zero.

        A tensor that is one fragment stays memory-mapped.
        """
        fragments = self.index.tensors[spec.name].fragments
        if len(fragments) == 1 and kind in self.index.kinds:
            self.bytes_read += 4 * spec.numel
            return self._stored(fragments[0], kind).view(spec.shape)
        out = torch.zeros(spec.shape)
        self.fill(out.flatten(), spec.name, kind, tuple((0, size) for size in spec.shape))
        return out

    def fill(self, out: Tensor, name: str, kind: str, box: Box, start: int = 0) -> None:
        """Fill `out` with the values of a flat range of a box, which begins at `start`. Moments may not be stored.

        Shapes: fp32 [length of the range].

        Raises:
            CheckpointError: a file does not hold what the index says.
        """
        if kind not in self.index.kinds:
            out.zero_()
            return
        wanted = list(rectangles(box, start, start + out.numel()))
        for fragment in self.index.tensors[name].fragments:
            if any(a >= b for a, b in intersection(box, fragment.box)):
                continue
            pairs = [
                (target, source)
                for source in rectangles(fragment.box, *fragment.range)
                for target in wanted
                if min(_common(target, source)[0]) > 0
            ]
            stored = self._stored(fragment, kind) if pairs else out
            for target, source in pairs:
                self._copy(out, target, stored, source)

    def _copy(self, out: Tensor, target: Rectangle, stored: Tensor, source: Rectangle) -> None:
        (rows, columns), (top, left) = _common(target, source)
        parts = []
        for buffer, rectangle in ((out, target), (stored, source)):
            height, width = (stop - start for start, stop in (rectangle.rows, rectangle.columns))
            matrix = buffer.narrow(0, rectangle.offset, height * width).view(height, width)
            at = top - rectangle.rows[0], left - rectangle.columns[0]
            parts.append(matrix[at[0] : at[0] + rows, at[1] : at[1] + columns])
        parts[0].copy_(parts[1])
        self.bytes_read += parts[1].nbytes

    def _stored(self, fragment: Fragment, kind: str) -> Tensor:
        """A fragment, memory-mapped."""
        path, key = self.directory / fragment.file, f"{fragment.key}.{kind}"
        try:
            if fragment.file not in self._files:
                self._files[fragment.file] = safe_open(path, framework="pt")
            if self._hashes is not None:
                self._hashes.reading(fragment.file, key)
            stored: Tensor = self._files[fragment.file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {key} cannot be read: {error}") from error
        if stored.dtype != torch.float32 or stored.shape != (fragment.numel,):
            raise CheckpointError(
                f"{path}: {key} is {stored.dtype} {list(stored.shape)}, the index says {torch.float32} "
                f"{[fragment.numel]}; get the checkpoint from its source again"
            )
        return stored


def _common(one: Rectangle, other: Rectangle) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the common part of two rectangles, if any, and its first row and column."""
    (top, bottom), (left, right) = intersection(one[:2], other[:2])
    return (bottom - top, right - left), (top, left)


def stored_box(spec: ParameterSpec, tensor_rank: int, tensor_size: int) -> Box:
    """The part of a global tensor that a tensor rank holds, without the padding of the vocabulary.

    It may be empty where a vocabulary is smaller than its padding.
    """
    box = [(0, size) for size in spec.shape]
    if spec.shard_dim is not None:
        size = spec.local_shape(tensor_size)[spec.shard_dim]
        stop = min((tensor_rank + 1) * size, spec.shape[spec.shard_dim])
        box[spec.shard_dim] = (min(tensor_rank * size, stop), stop)
    return tuple(box)
