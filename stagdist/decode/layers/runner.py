"""The layers of a section over new positions only; earlier ones come from the caches.

Products on this rank's shard and one sum over the tensor ranks after each product that needs it: megatron-core's
layers cost as much again in overhead where a product has one row. The mathematics is that of `stagdist/model/`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.cells import AnyCells, Cells, rotate
from stagdist.decode.layers.matrix import Matrix, linear
from stagdist.decode.layers.weights import Device, LayerWeights, SectionWeights
from stagdist.decode.topology import Limits

Reduce = Callable[[Tensor], Tensor]
"""Sum of a partial result over the tensor ranks."""

Lap = Callable[[str], None]
"""Called with the name of a phase when it ends."""


class SectionMath(Protocol):
    """The parts of a layer, as a section calls them one after the other: in torch (`LayerMath`) or in kernels.

    The cells are of a kind that the implementation takes. `cross_attention` and `mlp` may change `hidden` in place.
    """

    def self_attention(self, layer: LayerWeights, hidden: Tensor, cells: Any, cache: Tensor) -> Tensor:
        """See `LayerMath.self_attention`."""

    def cross_attention(self, layer: LayerWeights, hidden: Tensor, cells: Any, memory: Tensor) -> Tensor:
        """See `LayerMath.cross_attention`."""

    def mlp(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        """See `LayerMath.mlp`."""

    def write_memory(
        self, weights: SectionWeights, previous: Tensor, null_rows: Tensor | None, cells: Any, cache: Tensor
    ) -> Tensor:
        """See `LayerMath.write_memory`."""


class LayerMath:
    """The parts of a layer for given head counts of this rank.

    Args:
        tensor_size: ranks that share the heads.
        reduce: None without tensor parallelism.
        lap: called at the end of every phase: `self_attention`, `cross_attention` and `mlp`.
    """

    def __init__(self, model: ModelConfig, tensor_size: int, reduce: Reduce | None, lap: Lap | None = None):
        self.width = model.head_width
        self.heads = model.num_attention_heads // tensor_size
        self.key_heads = model.key_value_heads // tensor_size
        self.memory_heads = model.cross_key_value_heads // tensor_size
        self.eps = model.rms_norm_eps
        self.reduce = reduce
        self._lap: Lap = lap or (lambda phase: None)

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm. Shapes: [..., H]."""
        return F.rms_norm(hidden, weight.shape, weight, self.eps)

    def self_attention(self, layer: LayerWeights, hidden: Tensor, cells: Cells, cache: Tensor) -> Tensor:
        """Residual stream after self-attention. Shapes: hidden [B, S, H], cache of one layer [2, B, K, S, D]."""
        states = linear(self.norm(hidden, layer.self_attention_norm), layer.qkv)
        states = states.unflatten(-1, (self.heads + 2 * self.key_heads, self.width))
        turning = self.heads + self.key_heads
        turned = rotate(states[:, :, :turning], cells.cos, cells.sin)
        states[:, :, self.heads : turning] = turned[:, :, self.heads :]
        new = states[:, :, self.heads :].unflatten(2, (2, self.key_heads))
        keys, values = cells.store_self(cache, new)
        query = turned[:, :, : self.heads].transpose(1, 2)
        hidden = hidden + self._attend(query, keys, values, layer.o, cells.self_mask, cells.causal)
        self._lap("self_attention")
        return hidden

    def cross_attention(self, layer: LayerWeights, hidden: Tensor, cells: Cells, memory: Tensor) -> Tensor:
        """Residual stream after cross-attention. Shapes: hidden [B, S, H], memory [2, B, C, entries, D]."""
        assert layer.cross_attention_norm is not None and layer.cross_q is not None and layer.cross_o is not None
        states = linear(self.norm(hidden, layer.cross_attention_norm), layer.cross_q)
        query = rotate(states.unflatten(-1, (self.heads, self.width)), cells.cos, cells.sin).transpose(1, 2)
        masks = cells.memory_mask, cells.memory_causal
        hidden = hidden + self._attend(query, memory[0], memory[1], layer.cross_o, *masks)
        self._lap("cross_attention")
        return hidden

    def mlp(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        """Residual stream after SwiGLU. Shapes: [B, S, H]."""
        gate, up = linear(self.norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        hidden = hidden + self._summed(linear(F.silu(gate) * up, layer.down))
        self._lap("mlp")
        return hidden

    def write_memory(
        self,
        weights: SectionWeights,
        previous: Tensor,
        null_rows: Tensor | None,
        cells: Cells,
        cache: Tensor,
    ) -> Tensor:
        """Write keys (rotated) and values of the memory for all layers at once and return the visible entries.

        Shapes: previous [B, S, H] is the earlier section's output already shifted, null_rows bool [B, S] where the
        null vector stands instead, cache [L, 2, B, C, W + 1, D] -> [L, 2, B, C, entries, D].
        """
        assert weights.memory_norm is not None and weights.memory_kv is not None
        memory = self.norm(previous, weights.memory_norm)
        if null_rows is not None:
            assert weights.null_memory is not None
            memory = torch.where(null_rows[..., None], weights.null_memory, memory)
        states = linear(memory, weights.memory_kv)
        states = states.unflatten(-1, (len(weights.layers), 2, self.memory_heads, self.width))
        keys = states[:, :, :, 0]
        states[:, :, :, 0] = rotate(keys, cells.cos[..., None, :, :], cells.sin[..., None, :, :])
        return cells.store_memory(cache, states)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, output: Matrix, mask: Tensor | None, causal: bool
    ) -> Tensor:
        mixed = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return self._summed(linear(mixed.transpose(1, 2).flatten(2), output))

    def _summed(self, partial: Tensor) -> Tensor:
        return partial if self.reduce is None else self.reduce(partial)


class SectionCache:
    """Caches of all layers of one section on this rank.

    Shapes: self_kv [L, 2, B, K, S + 1, D], memory_kv [L, 2, B, C, W + 1, D] with W = min(window, S); index 0 of the
    second dimension holds keys (rotated), 1 values. Entries that were never written, and the last ones, are never seen.

    Args:
        limits: their `num_slots` are B, their `max_context` is S.
        tensor_size: ranks that share the heads.
    """

    def __init__(self, model: ModelConfig, section: int, limits: Limits, tensor_size: int, device: Device):
        layers, slots = model.section_layers[section], limits.num_slots

        def zeros(heads: int, entries: int) -> Tensor:
            # Zeros, not empty memory: a masked entry times weight zero must not be NaN.
            shape = (layers, 2, slots, heads // tensor_size, entries + 1, model.head_width)
            return torch.zeros(shape, dtype=device.dtype, device=device.name)

        self.self_kv = zeros(model.key_value_heads, limits.max_context)
        self.memory_kv: Tensor | None = None
        if model.staggered and section > 0:
            window = min(model.cross_attention_window or limits.max_context, limits.max_context)
            self.memory_kv = zeros(model.cross_key_value_heads, window)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first positions of a slot to another one; all entries of a ring buffer that was overwritten."""
        for cache in (self.self_kv, self.memory_kv):
            if cache is not None:
                kept = min(count, cache.shape[4] - 1)
                cache[:, :, target, :, :kept] = cache[:, :, source, :, :kept]

    def exchange(self, one: int, other: int, count: int) -> None:
        """Exchange the first positions of two slots; all entries of a ring buffer that was overwritten."""
        for cache in (self.self_kv, self.memory_kv):
            if cache is not None:
                kept = min(count, cache.shape[4] - 1)
                first, second = cache[:, :, one, :, :kept], cache[:, :, other, :, :kept]
                before = first.clone()
                first.copy_(second)
                second.copy_(before)

    @property
    def kv_bytes(self) -> int:
        """Memory held."""
        return self.self_kv.nbytes + (0 if self.memory_kv is None else self.memory_kv.nbytes)


class SectionRunner:
    """One section on this rank."""

    def __init__(self, math: SectionMath, weights: SectionWeights, cache: SectionCache):
        self._math, self._weights, self._cache = math, weights, cache

    def begin(self, hidden: Tensor, cells: AnyCells) -> Tensor:
        """The first self-attention: all that can be done before the memory is there. Shapes: [B, S, H]."""
        return self._math.self_attention(self._weights.layers[0], hidden, cells, self._cache.self_kv[0])

    def finish(self, hidden: Tensor, cells: AnyCells, previous: Tensor | None, null_rows: Tensor | None) -> Tensor:
        """Everything after `begin`.

        Args:
            previous: [B, S, H], output of the earlier section at the positions that these see newly; None without
                memory.
            null_rows: bool [B, S], where there is no such position.

        Returns: [B, S, H], the section's output.
        """
        math = self._math
        memory: Tensor | None = None
        if previous is not None:
            assert self._cache.memory_kv is not None
            memory = math.write_memory(self._weights, previous, null_rows, cells, self._cache.memory_kv)
        for index, layer in enumerate(self._weights.layers):
            if index:
                hidden = math.self_attention(layer, hidden, cells, self._cache.self_kv[index])
            if memory is not None:
                hidden = math.cross_attention(layer, hidden, cells, memory[index])
            hidden = math.mlp(layer, hidden)
        return hidden
