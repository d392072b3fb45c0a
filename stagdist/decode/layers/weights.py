"""Weights of one rank, fused for decoding: few large products instead of many small ones."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from torch import Tensor

from stagdist.checkpoint.published.model_reader import ReadSlice
from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.matrix import Int8Matrix, Matrix, parts_of, quantize
from stagdist.decode.topology import Topology
from stagdist.errors import ConfigError
from stagdist.parallel.device import on_cuda
from stagdist.parallel.layout import ParameterSpec, model_parameters


@dataclass(frozen=True)
class Device:
    """Where and in which precision a rank computes.

    Attributes:
        by_rows: weights lie by rows in memory, as compiled layers read them.
    """

    name: str
    dtype: torch.dtype
    by_rows: bool = False

    def matrix(self, rows: int, columns: int) -> Tensor:
        """An empty weight [rows, columns] for `F.linear`.

        On CPUs its columns are contiguous where torch computes the steps: its products with one row then run half as
        fast again (measured with `benchmarks/decode.py`), products with many rows the same.
        """
        if self.name == "cpu" and not self.by_rows:
            return torch.empty(columns, rows, dtype=self.dtype).t()
        return torch.empty(rows, columns, dtype=self.dtype, device=self.name)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Empty memory of the host for values from the device, pinned if that is a GPU."""
        return torch.empty(shape, dtype=dtype, pin_memory=on_cuda(self.name))

    def upload(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Copy values (nested for several dimensions) to the device; the host does not wait.

        The copy comes from pinned memory. From pageable memory it would wait for all earlier work of the stream.
        """
        host = torch.tensor(values, dtype=dtype, pin_memory=on_cuda(self.name))
        return host.to(self.name, non_blocking=True)


@dataclass(frozen=True)
class Shard:
    """This rank's position on the tensor axis."""

    rank: int = 0
    size: int = 1

    def bounds(self, length: int) -> tuple[int, int]:
        """Entries of a split dimension that belong to this rank; the last ranks may get fewer."""
        each = -(-length // self.size)
        return min(self.rank * each, length), min((self.rank + 1) * each, length)


@dataclass(frozen=True)
class LayerWeights:
    """One layer on this rank. N, K and I count this rank's heads and inner width, C its cross-attention key heads.

    Shapes: qkv [(N + 2K) D, H], o [H, N D], gate_up [2 I, H], down [H, I], cross_q [N D, H], cross_o [H, N D].
    """

    self_attention_norm: Tensor
    qkv: Matrix
    o: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix
    cross_attention_norm: Tensor | None = None
    cross_q: Matrix | None = None
    cross_o: Matrix | None = None


@dataclass(frozen=True)
class SectionWeights:
    """One section on this rank.

    Shapes: memory_norm and null_memory [H]; memory_kv [L 2 C D, H]: keys and values of the memory for all layers at
    once, since all of them project the same vector; mix: scalar.
    """

    layers: tuple[LayerWeights, ...]
    memory_norm: Tensor | None = None
    null_memory: Tensor | None = None
    memory_kv: Matrix | None = None
    mix: Tensor | None = None


@dataclass(frozen=True)
class StageWeights:
    """Everything one rank needs.

    Attributes:
        embedding: [V, H], the complete vocabulary; None where no section starts from tokens.
        sections: by index.
        output_norm: [H], where the rank holds a part of the head.
        head: [slice, H], its part of the vocabulary.
        first_token: first token of that part.
    """

    embedding: Tensor | None
    sections: dict[int, SectionWeights]
    output_norm: Tensor | None
    head: Matrix | None
    first_token: int

    def tensors(self) -> list[Tensor]:
        """Every tensor once, tied ones too; two of each matrix in int8."""
        sections = self.sections.values()
        parts = [self, *sections, *(layer for section in sections for layer in section.layers)]
        held = [value for part in parts for value in vars(part).values()]
        found = [tensor for value in held if isinstance(value, Matrix) for tensor in parts_of(value)]
        return list({(tensor.data_ptr(), tensor.numel()): tensor for tensor in found}.values())


READ_BYTES = 1 << 26
"""Rows that are read at a time, as fp32."""

Rows = Sequence[tuple[ParameterSpec, int, int]]
"""Parameters, and the first row and the end of what is used of each."""

WeightFormat = Literal["int8"]
"""How matrices are held, where not in the precision of the computation."""

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)


def check_weight_format(weights: str | None, dtype: torch.dtype | None) -> None:
    """Check that there is such a format of weights, and that it works in a dtype, if one is given.

    Raises:
        ConfigError: it does not; with the remedy.
    """
    if weights is not None and weights not in WEIGHT_FORMATS:
        raise ConfigError(f"weights (--weights) is {weights!r}; give {' or '.join(WEIGHT_FORMATS)}, or None for floats")
    if weights == "int8" and dtype == torch.float16:
        raise ConfigError("weights in int8 do not work in fp16, whose range sums of them exceed; choose bf16 or fp32")


class WeightLoader:
    """Copies this rank's slices of a model into fused tensors.

    Args:
        read: gives slices of parameters.
        shard: position on the tensor axis.
        weights: `int8`: quantize every matrix but the embedding; None: all weights have the dtype of `device`.
    """

    def __init__(
        self, model: ModelConfig, read: ReadSlice, shard: Shard, device: Device, weights: WeightFormat | None = None
    ):
        self._model, self._read, self._shard, self._device = model, read, shard, device
        self._int8 = weights == "int8"
        self._specs = {spec.name: spec for spec in model_parameters(model)}
        self._cores: dict[str, LayerWeights] = {}  # by the prefix of their names; sections may share them

    def stage(self, topology: Topology, stage: int) -> StageWeights:
        """Weights of a stage, its share of the head among them."""
        sharded, tied, shard = topology.head == "sharded", self._model.tie_word_embeddings, self._shard
        embedding = norm = None
        head: Matrix | None = None
        if self._model.staggered or stage == 0:
            embedding = self._embedding()
        if sharded:
            shard = Shard(stage * shard.size + shard.rank, topology.num_stages * shard.size)
        first, stop = shard.bounds(self._model.vocab_size)
        if sharded or stage == topology.last_stage:
            norm = self._vector("output_norm.weight")
            if tied and embedding is not None and not self._int8:
                head = embedding[first:stop]
            else:
                head = self._rows([(self._specs["embedding.weight" if tied else "head.weight"], first, stop)])
        sections = {section: self.section(section) for section in topology.sections(stage)}
        return StageWeights(embedding, sections, norm, head, first)

    def section(self, section: int) -> SectionWeights:
        """One section."""
        prefix, layers = f"sections.{section}.", range(self._model.section_layers[section])
        weights = SectionWeights(
            tuple(self._layer(section, layer) for layer in layers),
            mix=self._vector("section_mix")[section] if self._model.combine_sections else None,
        )
        if not self._model.staggered or section == 0:
            return weights
        names = [f"{prefix}layers.{layer}.cross_attention.{part}_proj.weight" for layer in layers for part in "kv"]
        return replace(
            weights,
            memory_norm=self._vector(prefix + "memory_norm.weight"),
            null_memory=self._vector(prefix + "null_memory") if self._model.stagger > 0 else None,
            memory_kv=self._stacked(names),
        )

    def _layer(self, section: int, layer: int) -> LayerWeights:
        prefix = f"sections.{section}.layers.{layer}."
        core = f"sections.0.layers.{layer}." if self._model.share_section_weights else prefix
        if core not in self._cores:
            self._cores[core] = self._core(core)
        if not self._model.staggered or section == 0:
            return self._cores[core]
        return replace(
            self._cores[core],
            cross_attention_norm=self._vector(prefix + "cross_attention_norm.weight"),
            cross_q=self._stacked([prefix + "cross_attention.q_proj.weight"]),
            cross_o=self._stacked([prefix + "cross_attention.o_proj.weight"]),
        )

    def _core(self, prefix: str) -> LayerWeights:
        return LayerWeights(
            self_attention_norm=self._vector(prefix + "self_attention_norm.weight"),
            qkv=self._stacked([f"{prefix}self_attention.{part}_proj.weight" for part in "qkv"]),
            o=self._stacked([prefix + "self_attention.o_proj.weight"]),
            mlp_norm=self._vector(prefix + "mlp_norm.weight"),
            gate_up=self._stacked([f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]),
            down=self._stacked([prefix + "mlp.down_proj.weight"]),
        )

    def _vector(self, name: str) -> Tensor:
        spec = self._specs[name]
        return self._read(spec, 0, 0, spec.shape[0]).to(self._device.name, self._device.dtype, copy=True)

    def _embedding(self) -> Tensor:
        spec = self._specs["embedding.weight"]
        return self._copied([(spec, 0, spec.shape[0])])

    def _stacked(self, names: list[str]) -> Matrix:
        """Matrices of one width below each other, each cut to this rank's part."""
        specs = [self._specs[name] for name in names]
        if specs[0].shard_dim == 0:
            return self._rows([(spec, *self._shard.bounds(spec.shape[0])) for spec in specs])
        (spec,) = specs
        start, stop = self._shard.bounds(spec.shape[1])
        if self._int8:
            return self._quantized([(spec, 0, spec.shape[0])], (start, stop))
        return self._device.matrix(spec.shape[0], stop - start).copy_(self._read(spec, 1, start, stop))

    def _rows(self, parts: Rows) -> Matrix:
        return self._quantized(parts, (0, parts[0][0].shape[1])) if self._int8 else self._copied(parts)

    def _copied(self, parts: Rows) -> Tensor:
        weight = self._device.matrix(sum(stop - start for _, start, stop in parts), parts[0][0].shape[1])
        for row, rows in self._pieces(parts):
            weight[row : row + len(rows)].copy_(rows)
        return weight

    def _quantized(self, parts: Rows, columns: tuple[int, int]) -> Int8Matrix:
        """Rows in int8, cut to some columns. Scales are those of complete rows, so they are the same on every grid."""
        count, device = sum(stop - start for _, start, stop in parts), self._device
        values = torch.empty(count, columns[1] - columns[0], dtype=torch.int8, device=device.name)
        exact = torch.float64 if device.dtype == torch.float64 else torch.float32
        scales = torch.empty(count, dtype=exact, device=device.name)
        for row, rows in self._pieces(parts):
            piece = quantize(rows.to(device.name))
            values[row : row + len(rows)] = piece.values[:, slice(*columns)]
            scales[row : row + len(rows)] = piece.scales
        return Int8Matrix(values, scales)

    def _pieces(self, parts: Rows) -> Iterator[tuple[int, Tensor]]:
        """Rows of several parameters below each other, with the index of the first one of each piece.

        In pieces, so that no second copy of a large table exists.
        """
        row = 0
        for spec, start, stop in parts:
            size = max(1, READ_BYTES // max(1, spec.shape[1] * 4))
            for begin in range(start, stop, size):
                end = min(begin + size, stop)
                yield row, self._read(spec, 0, begin, end)
                row += end - begin


def random_reader(specs_seed: int, device: str = "cpu") -> ReadSlice:
    """Slices of random weights, for benchmarks of shapes that no checkpoint exists for.

    Args:
        specs_seed: with the name of a parameter it determines its values on one kind of device.
        device: where they are made; a GPU fills billions of values in the time in which a CPU fills millions.
    """

    def read(spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
        if spec.std is None:
            shape = list(spec.shape)
            shape[dim] = stop - start
            return torch.full(shape, spec.fill, device=device)
        begin, end = (start, stop) if dim == 0 else (0, spec.shape[0])
        size = max(1, READ_BYTES // (4 * math.prod(spec.shape[1:])))
        blocks = []
        for first in range(begin - begin % size, end, size):
            # Equal numbers in embedding and head would make every token its own successor.
            generator = torch.Generator(device).manual_seed(specs_seed + crc32(f"{spec.name} {first}".encode()))
            block = torch.empty(min(size, spec.shape[0] - first), *spec.shape[1:], device=device)
            block.normal_(std=spec.std, generator=generator)
            blocks.append(block[max(0, begin - first) : end - first])
        rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return rows if dim == 0 else rows[:, start:stop]

    return read
