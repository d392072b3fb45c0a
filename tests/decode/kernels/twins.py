"""The parts of a layer in kernels and in plain torch, on the same random inputs; called where Triton interprets."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.kernels import split_attention
from stagdist.decode.kernels.fused_math import FusedMath
from stagdist.decode.layers.cells import Angles, DeviceCells, StepCells
from stagdist.decode.layers.matrix import Int8Matrix, Matrix, quantize
from stagdist.decode.layers.runner import LayerMath, SectionCache
from stagdist.decode.layers.weights import Device, LayerWeights, SectionWeights, WeightFormat
from stagdist.decode.native.layer_math import NativeMath
from stagdist.decode.topology import Limits
from stagdist.model.precision import DTYPES
from tests.decode.decoding import Case, run_cases
from tests.reference.variants import BASE

CONTEXT = 40


class MathKind(Enum):
    """Which implementation computes the parts of a layer."""

    TORCH = "torch"
    TRITON = "triton"
    NATIVE = "native"


@dataclass(frozen=True)
class Shape:
    """A model and the rows of a step.

    Attributes:
        keys: model keys added to the small base.
        positions: of the requests; -1 without one.
        repeats: rows per request. Cross-attention is that of the last of them, whose rows are then strided.
        smallest_split: entries, so that few of them are split.
        doubled: a sum over tensor ranks, of two that have the same, follows the products.
        weights: format of the matrices.
    """

    keys: dict[str, Any]
    positions: tuple[int, ...]
    precision: str = "fp64"
    repeats: int = 1
    smallest_split: int = 16
    doubled: bool = False
    weights: WeightFormat | None = None


class Layers:
    """Random weights of one layer and a memory of two, filled caches, and states; the same for each precision."""

    def __init__(self, shape: Shape, precision: str, *, by_rows: bool = False):
        self.shape, self.model = (
            shape,
            ModelConfig(**BASE | {"max_position_embeddings": CONTEXT, "section_layers": [2, 2]} | shape.keys),
        )
        self.device = Device("cpu", DTYPES[precision], by_rows)
        self.limits = Limits(len(shape.positions), CONTEXT, 8)
        self._random = torch.Generator().manual_seed(5)
        model, values, matrix = self.model, self._values, self._matrix
        hidden, inner, width = model.hidden_size, model.intermediate_size, model.head_width
        query, key, memory = (
            heads * width for heads in (model.num_attention_heads, model.key_value_heads, model.cross_key_value_heads)
        )
        self.layer = LayerWeights(
            values(hidden), matrix(query + 2 * key, hidden), matrix(hidden, query), values(hidden),
            matrix(2 * inner, hidden), matrix(hidden, inner), values(hidden), matrix(query, hidden),
            matrix(hidden, query),
        )  # fmt: skip
        self.section = SectionWeights((self.layer,) * 2, values(hidden), values(hidden), matrix(4 * memory, hidden))
        rows = len(shape.positions) * shape.repeats
        self.hidden, self.previous = values(rows, 1, hidden), values(len(shape.positions), 2, hidden)[:, 1:]
        wide = replace(self.limits, num_slots=rows)
        self.self_kv = self._filled(SectionCache(model, 1, wide, 1, self.device).self_kv)[0]
        memory_kv = SectionCache(model, 1, self.limits, 1, self.device).memory_kv
        assert memory_kv is not None
        self.memory_kv = self._filled(memory_kv)
        self.angles = Angles(model, Device("cpu", DTYPES[shape.precision]))
        self.angles.cos, self.angles.sin = (each.to(self.device.dtype) for each in (self.angles.cos, self.angles.sin))

    def _values(self, *size: int) -> Tensor:
        """Random values that the precision of the shape has. Weights have the layout of a CPU."""
        values = torch.randn(size, generator=self._random, dtype=torch.float64) / size[-1] ** 0.5
        values = values.to(DTYPES[self.shape.precision]).to(self.device.dtype)
        return values.t().contiguous().t() if values.dim() == 2 and not self.device.by_rows else values

    def _matrix(self, *size: int) -> Matrix:
        values = self._values(*size)
        if self.shape.weights is None:
            return values
        found = quantize(values)
        return Int8Matrix(found.values, found.scales.to(torch.promote_types(self.device.dtype, torch.float32)))

    def _filled(self, cache: Tensor) -> Tensor:
        return cache.copy_(self._values(*cache.shape) * cache.shape[-1] ** 0.5)

    def run(self, kind: MathKind) -> dict[str, Tensor]:
        """The results of every part, each from the same states; rows without a request are left out."""
        positions = torch.tensor(self.shape.positions)
        repeats, rows, reduce = self.shape.repeats, self.hidden.clone(), _doubled if self.shape.doubled else None
        math: Any
        cells: Any
        wide: Any
        if kind is not MathKind.TORCH:
            math = (
                FusedMath(self.model, 1, reduce, self.limits, self.device, repeats=repeats)
                if kind is MathKind.TRITON
                else NativeMath(self.model, 1, reduce, self.device.dtype)
            )
            cells, wide = (DeviceCells(self.angles, positions, repeats=count) for count in (1, repeats))
        else:
            math = LayerMath(self.model, 1, reduce)
            cells, wide = (StepCells(self.angles, positions, CONTEXT, repeats=count) for count in (1, repeats))
        null_rows = (positions < 2)[:, None]
        memory = math.write_memory(self.section, self.previous, null_rows, cells, self.memory_kv)
        strided = rows.clone().unflatten(0, (-1, repeats))[:, -1]
        results = {
            "self": math.self_attention(self.layer, rows, wide, self.self_kv),
            "input": rows,
            "cross": math.cross_attention(self.layer, strided, cells, memory[1]),
            "mlp": math.mlp(self.layer, rows.clone()),
        }
        served = positions >= 0
        wide_served = served.repeat_interleave(repeats)
        kept = {name: value[served if name == "cross" else wide_served].clone() for name, value in results.items()}
        kept["cache"] = self.self_kv[:, wide_served, :, :-1]
        kept["memory"] = self.memory_kv[:, :, served, :, :-1]
        if kind is not MathKind.TORCH:  # plain torch computes something for these rows, and no one reads it
            kept |= {"unserved": results["self"][~wide_served], "unserved cache": self.self_kv[:, ~wide_served]}
        return kept


@dataclass(frozen=True)
class Served:
    """Tokens of each request, without kernels and with them, and the largest distance of their logits."""

    plain: list[list[int]]
    kernels: list[list[int]]
    difference: float


def perform(payload: tuple[dict[str, Shape], list[Case]]) -> tuple[dict[str, dict[str, float]], list[Served]]:
    """Compare the parts of layers, then serve requests with kernels and without."""
    shapes, cases = payload
    found = differences(shapes)
    split_attention.SMALLEST_SPLIT = 8  # of a context of 24
    return found, [_served(case) for case in cases]


def _served(case: Case) -> Served:
    plain, fused = run_cases([case, replace(case, options=replace(case.options, graphs=True, kernels=True))])
    difference = 0.0
    for (_, positions, one), (_, others, other) in zip(plain.logits, fused.logits, strict=True):
        served = [row for row, position in enumerate(positions) if position > 0]
        assert [positions[row] for row in served] == others
        difference = max(difference, _distance(other, one[served]))
    tokens = [[list(done.token_ids) for done in ran.completions] for ran in (plain, fused)]
    return Served(tokens[0], tokens[1], difference)


def _doubled(partial: Tensor) -> Tensor:
    return partial * 2


def differences(shapes: dict[str, Shape], kind: MathKind = MathKind.TRITON) -> dict[str, dict[str, float]]:
    """Largest distance of the results of kernels from those of plain torch in fp64, by shape and part."""
    found: dict[str, dict[str, float]] = {}
    for name, shape in shapes.items():
        if kind is MathKind.TRITON:
            split_attention.SMALLEST_SPLIT = shape.smallest_split
        exact = Layers(shape, "fp64")
        unserved = torch.tensor([position < 0 for position in shape.positions for _ in range(shape.repeats)])
        unchanged = {"unserved": exact.hidden[unserved], "unserved cache": exact.self_kv[:, unserved].clone()}
        expected = exact.run(MathKind.TORCH) | unchanged
        kernels = Layers(shape, shape.precision, by_rows=kind is MathKind.NATIVE).run(kind)
        found[name] = {part: _distance(kernels[part], right) for part, right in expected.items()}
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max()) if other.numel() else 0.0
