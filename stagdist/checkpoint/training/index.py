"""`index.json`: where the fragments of every global tensor are. Imports no torch.

A tensor is cut into boxes by tensor parallelism, and a box into flat ranges by ZeRO-1. `docs/checkpoints.md` describes
the file.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from stagdist.checkpoint.complete import refuse_undownloaded
from stagdist.errors import CheckpointError, OtherReleaseError
from stagdist.parallel.layout import ParameterSpec

INDEX = "index.json"
FORMAT_VERSION = 1
VALUE = "value"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (VALUE, *MOMENTS)
"""What is stored of a parameter, all in fp32: its value and Adam's two moments."""

_NAME = r"^\w[\w.-]*$"

Box = tuple[tuple[int, int], ...]
"""A part of a tensor: start and stop in every dimension."""


class Fragment(BaseModel):
    """A part of a global tensor in one file.

    Attributes:
        file: name of the safetensors file.
        key: the file stores it as `{key}.{kind}`, one-dimensional fp32.
        box: part of the tensor that the range belongs to.
        range: start and stop in the flattened (row-major) box.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=_NAME)
    key: str = Field(pattern=_NAME)
    box: tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
    range: tuple[NonNegativeInt, NonNegativeInt]

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.range[1] - self.range[0]


class IndexedTensor(BaseModel):
    """A global tensor: its shape and all fragments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[NonNegativeInt, ...]
    fragments: tuple[Fragment, ...]


class CheckpointIndex(BaseModel):
    """The content of `index.json`.

    Attributes:
        kinds: `value` alone, or all of `KINDS`; moments that are not stored are zero.
        tensors: by canonical name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    kinds: tuple[str, ...]
    tensors: dict[str, IndexedTensor]

    def as_text(self) -> str:
        """The content of the file."""
        return self.model_dump_json() + "\n"

    def files(self) -> set[str]:
        """Names of the safetensors files."""
        return {fragment.file for tensor in self.tensors.values() for fragment in tensor.fragments}

    def problem(self, specs: Iterable[ParameterSpec]) -> str | None:
        """Why the index does not describe exactly the tensors of a model; None if it does."""
        expected = {spec.name: spec for spec in specs}
        if odd := sorted(expected.keys() ^ self.tensors.keys()):
            return f"{odd[0]} is missing" if odd[0] in expected else f"{odd[0]} is no tensor of the model"
        for name, tensor in self.tensors.items():
            if tensor.shape != expected[name].shape:
                return f"{name} is {list(tensor.shape)}, the model needs {list(expected[name].shape)}"
            if reason := _gap_or_overlap(tensor):
                return f"{name}: {reason}"
        return None


def index_of(
    owned: Iterable[tuple[str, Fragment]], specs: Sequence[ParameterSpec], kinds: Iterable[str]
) -> CheckpointIndex:
    """The index of fragments that ranks have written, each with the canonical name of its tensor."""
    by_name: dict[str, list[Fragment]] = {spec.name: [] for spec in specs}
    for name, fragment in owned:
        by_name[name].append(fragment)
    tensors = {spec.name: IndexedTensor(shape=spec.shape, fragments=tuple(by_name[spec.name])) for spec in specs}
    return CheckpointIndex(kinds=tuple(kinds), tensors=tensors)


def read_index(directory: Path) -> CheckpointIndex:
    """Read `index.json`.

    Raises:
        CheckpointError: it is missing or damaged, or of another version of the format.
    """
    path = directory / INDEX
    try:
        refuse_undownloaded(path)
        index = CheckpointIndex.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is damaged: {where}: {first['msg']}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if index.format_version != FORMAT_VERSION:
        raise OtherReleaseError(
            f"{path}: format_version is {index.format_version}; this release reads {FORMAT_VERSION}"
        )
    if index.kinds not in ((VALUE,), KINDS):
        raise CheckpointError(f"{path}: kinds are {list(index.kinds)}; {[VALUE]} or {list(KINDS)} are read")
    return index


class Rectangle(NamedTuple):
    """Rows and columns of a global matrix whose values are next to each other in a flat buffer, from `offset` on."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    offset: int


def rectangles(box: Box, start: int, stop: int) -> Iterator[Rectangle]:
    """The rectangles that a flat range of a box consists of: the end of a row, full rows, the beginning of a row.

    A vector is a matrix with one column.
    """
    (top, _), (left, right) = box if len(box) == 2 else (*box, (0, 1))
    width = right - left
    at = start
    while at < stop:
        row, column = divmod(at, width)
        if column == 0 and stop - at >= width:
            rows = (stop - at) // width
            yield Rectangle((top + row, top + row + rows), (left, right), at - start)
            at += rows * width
        else:
            end = min(stop, (row + 1) * width)
            yield Rectangle((top + row, top + row + 1), (left + column, left + column + end - at), at - start)
            at = end


def box_numel(box: Box) -> int:
    """Number of values in a box."""
    return prod(stop - start for start, stop in box)


def _gap_or_overlap(tensor: IndexedTensor) -> str | None:
    """Why the fragments do not hold every value exactly once."""
    ranges: dict[Box, list[tuple[int, int]]] = {}
    for fragment in tensor.fragments:
        inside = len(fragment.box) == len(tensor.shape) and all(
            start < stop <= size for (start, stop), size in zip(fragment.box, tensor.shape, strict=True)
        )
        if not inside or not fragment.range[0] < fragment.range[1] <= box_numel(fragment.box):
            return f"a fragment in {fragment.file} is outside the tensor"
        ranges.setdefault(fragment.box, []).append(fragment.range)
    for box, found in ranges.items():
        ends = [(0, 0), *sorted(found), (box_numel(box), 0)]
        if any(before[1] != after[0] for before, after in pairwise(ends)):
            return f"the fragments of {[list(side) for side in box]} do not hold every value once"
    if any(_overlap(one, other) for one, other in combinations(ranges, 2)):
        return "two fragments overlap"
    stored = sum(map(box_numel, ranges))
    return None if stored == prod(tensor.shape) else f"{stored} of {prod(tensor.shape)} values are stored"


def _overlap(one: Box, other: Box) -> bool:
    return all(start < stop for start, stop in intersection(one, other))


def intersection(one: Box, other: Box) -> Box:
    """The common part of two boxes; empty where a stop is not above its start."""
    return tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True))
