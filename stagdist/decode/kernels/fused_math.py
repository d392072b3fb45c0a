"""The layers of a decode step as Triton kernels: five for self-attention and MLP, eight with cross-attention.

`LayerMath` is the same mathematics in plain torch. With many rows, products are those of torch, and there are up to
twelve kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.kernels.memory_store import store_memory
from stagdist.decode.kernels.products import FEW_ROWS, add_linear, norm_linear, norm_swiglu, swiglu
from stagdist.decode.kernels.split_attention import Partials, attend, num_splits
from stagdist.decode.layers.cells import DeviceCells
from stagdist.decode.layers.matrix import Int8Matrix, Matrix, linear
from stagdist.decode.layers.runner import Reduce
from stagdist.decode.layers.weights import Device, LayerWeights, SectionWeights
from stagdist.decode.topology import Limits


def normed_product(rows: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
    """RMSNorm and product of any number of rows. Shapes: rows [B, H], norm [H], weight [N, H] -> [B, N]."""
    if len(rows) <= FEW_ROWS:
        return norm_linear(rows, norm, eps, weight)
    return linear(F.rms_norm(rows, norm.shape, norm, eps), weight)


class FusedMath:
    """The parts of a layer for steps: one position of each row, placed by `DeviceCells`.

    Its kernels share buffers, so sections that run side by side need one each.

    Args:
        tensor_size: ranks that share the heads.
        reduce: None without tensor parallelism.
        limits: their `num_slots` times `repeats` are the rows, at most; their `max_context` bounds every cache.
        repeats: rows of a request.
    """

    def __init__(
        self,
        model: ModelConfig,
        tensor_size: int,
        reduce: Reduce | None,
        limits: Limits,
        device: Device,
        *,
        repeats: int = 1,
    ):
        self._heads = model.num_attention_heads // tensor_size
        self._eps, self._reduce = model.rms_norm_eps, reduce
        rows, entries = limits.num_slots * repeats, limits.max_context
        key_heads = {heads // tensor_size for heads in (model.key_value_heads, model.cross_key_value_heads)}
        splits = max(count * num_splits(count, heads, entries) for heads in key_heads for count in range(1, rows + 1))
        done = rows * max(key_heads)
        self._partials = Partials.allocate(self._heads * splits, done, model.head_width, device.dtype, device.name)

    def self_attention(self, layer: LayerWeights, hidden: Tensor, cells: DeviceCells, cache: Tensor) -> Tensor:
        """Residual stream after self-attention, a new tensor; writes the keys and values of the rows to the cache.

        Shapes: hidden [B, 1, H], cache of one layer [2, B, K, S + 1, D].
        """
        rows = hidden[:, 0]
        states = normed_product(rows, layer.self_attention_norm, self._eps, layer.qkv)
        mixed = attend(
            states, cells.positions, cells.angles, cache, self._heads, self._partials, stores=True,
            repeats=cells.repeats,
        )  # fmt: skip
        return self._add_linear(rows, mixed, layer.o, None)[:, None]

    def cross_attention(self, layer: LayerWeights, hidden: Tensor, cells: DeviceCells, memory: Tensor) -> Tensor:
        """Residual stream after cross-attention, in place.

        Shapes: hidden [B, 1, H] with any stride of rows, memory of one layer [2, B, C, W + 1, D].
        """
        assert layer.cross_attention_norm is not None and layer.cross_q is not None and layer.cross_o is not None
        rows = hidden[:, 0]
        query = normed_product(rows, layer.cross_attention_norm, self._eps, layer.cross_q)
        mixed = attend(query, cells.positions, cells.angles, memory, self._heads, self._partials, stores=False)
        self._add_linear(rows, mixed, layer.cross_o, rows)
        return hidden

    def mlp(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        """Residual stream after SwiGLU, in place. Shapes: [B, 1, H]."""
        rows = hidden[:, 0]
        if len(rows) <= FEW_ROWS:
            inner = norm_swiglu(rows, layer.mlp_norm, self._eps, layer.gate_up)
        else:
            inner = swiglu(normed_product(rows, layer.mlp_norm, self._eps, layer.gate_up))
        self._add_linear(rows, inner, layer.down, rows)
        return hidden

    def write_memory(
        self,
        weights: SectionWeights,
        previous: Tensor,
        null_rows: Tensor | None,
        cells: DeviceCells,
        cache: Tensor,
    ) -> Tensor:
        """As `LayerMath.write_memory`; returns the cache of all layers."""
        assert weights.memory_norm is not None and weights.memory_kv is not None
        rows, null = previous[:, 0], weights.null_memory
        null_rows = None if null_rows is None else null_rows[:, 0]
        if len(rows) <= FEW_ROWS:
            states = norm_linear(
                rows, weights.memory_norm, self._eps, weights.memory_kv, null=null, null_rows=null_rows
            )
        else:
            memory = F.rms_norm(rows, weights.memory_norm.shape, weights.memory_norm, self._eps)
            if null_rows is not None:
                assert null is not None
                memory = torch.where(null_rows[:, None], null, memory)
            states = linear(memory, weights.memory_kv)
        store_memory(states, cells.positions, cells.angles, cache)
        return cache

    def _add_linear(self, residual: Tensor, rows: Tensor, weight: Matrix, out: Tensor | None) -> Tensor:
        """Add a product, summed over the tensor ranks, to the residual. Shapes: [B, H], rows [B, N]."""
        if self._reduce is not None:
            partial = add_linear(None, rows, weight) if len(rows) <= FEW_ROWS else linear(rows, weight)
            return torch.add(residual, self._reduce(partial), out=out)
        if len(rows) <= FEW_ROWS:
            return add_linear(residual, rows, weight, out)
        if isinstance(weight, Int8Matrix):
            return torch.add(residual, linear(rows, weight), out=out)
        return torch.addmm(residual, rows, weight.t(), out=out)
