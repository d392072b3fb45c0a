"""The layers of a decode step in C++, for CPUs: one call for self-attention, cross-attention and MLP each.

`LayerMath` computes the same in plain torch with about 18 operations for a layer. In small models their overhead is a
quarter of a step.
"""

import ctypes

import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.cells import DeviceCells
from stagdist.decode.layers.matrix import Int8Matrix, Matrix
from stagdist.decode.layers.runner import Lap, Reduce
from stagdist.decode.layers.weights import LayerWeights, SectionWeights
from stagdist.decode.native.library import library

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
"""Types that the functions are compiled for."""

FEW_ROWS = 64
"""Most rows of a product that is faster here than in torch."""

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64


class LayerPart(ctypes.Structure):
    """`Part` of `layers.cpp`, which explains the fields."""

    _fields_ = [
        ("rows", _ADDRESS), ("row_stride", _COUNT), ("count", _COUNT),
        ("out", _ADDRESS), ("out_stride", _COUNT), ("adds", _COUNT),
        ("gain", _ADDRESS), ("eps", ctypes.c_double),
        ("first_values", _ADDRESS), ("first_scales", _ADDRESS), ("first_rows", _COUNT), ("first_columns", _COUNT),
        ("second_values", _ADDRESS), ("second_scales", _ADDRESS), ("second_rows", _COUNT), ("second_columns", _COUNT),
        ("heads", _COUNT), ("threads", _COUNT),
        ("positions", _ADDRESS), ("cos", _ADDRESS), ("sin", _ADDRESS), ("repeats", _COUNT), ("width", _COUNT),
        ("cache", _ADDRESS), ("cache_heads", _COUNT), ("entries", _COUNT), ("kind_stride", _COUNT),
        ("slot_stride", _COUNT),
        ("null", _ADDRESS), ("null_rows", _ADDRESS), ("layers", _COUNT), ("layer_stride", _COUNT),
    ]  # fmt: skip


class NativeMath:
    """The parts of a layer for steps: one position of each row, placed by `DeviceCells`.

    Args:
        tensor_size: ranks that share the heads.
        reduce: None without tensor parallelism.
        lap: called at the end of every phase: `self_attention`, `cross_attention` and `mlp`.

    Raises:
        ConfigError: see `library`.
    """

    def __init__(
        self, model: ModelConfig, tensor_size: int, reduce: Reduce | None, dtype: torch.dtype, lap: Lap | None = None
    ):
        self._heads, self._eps, self._reduce = model.num_attention_heads // tensor_size, model.rms_norm_eps, reduce
        self._lap: Lap = lap or (lambda phase: None)
        # By what they are for, owner and address of the cache. The owner is kept, so that its id stays its own.
        self._parts: dict[tuple[str, int, int], tuple[object, LayerPart]] = {}
        functions = library()
        self._self_attention, self._cross_attention, self._mlp, self._write_memory, self._norm_linear = (
            getattr(functions, f"{name}_{NAMES[dtype]}")
            for name in ("self_attention", "cross_attention", "mlp", "write_memory", "norm_linear")
        )

    def self_attention(self, layer: LayerWeights, hidden: Tensor, cells: DeviceCells, cache: Tensor) -> Tensor:
        """Residual stream after self-attention, a new tensor; writes the keys and values of the rows to the cache.

        Shapes: hidden [B, 1, H], cache of one layer [2, B, K, S + 1, D].
        """
        part = self._part("self", layer, layer.self_attention_norm, layer.qkv, layer.o, cache=cache)
        part.repeats = cells.repeats
        part.positions, part.cos, part.sin = cells.addresses
        out = self._run(self._self_attention, part, hidden, torch.empty_like(hidden))
        self._lap("self_attention")
        return out

    def cross_attention(self, layer: LayerWeights, hidden: Tensor, cells: DeviceCells, memory: Tensor) -> Tensor:
        """Residual stream after cross-attention, in place.

        Shapes: hidden [B, 1, H] with any stride of rows, memory of one layer [2, B, C, W + 1, D].
        """
        assert layer.cross_attention_norm is not None and layer.cross_q is not None and layer.cross_o is not None
        part = self._part("cross", layer, layer.cross_attention_norm, layer.cross_q, layer.cross_o, cache=memory)
        part.positions, part.cos, part.sin = cells.addresses
        out = self._run(self._cross_attention, part, hidden, hidden)
        self._lap("cross_attention")
        return out

    def mlp(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        """Residual stream after SwiGLU, in place. Shapes: [B, 1, H]."""
        part = self._part("mlp", layer, layer.mlp_norm, layer.gate_up, layer.down)
        out = self._run(self._mlp, part, hidden, hidden)
        self._lap("mlp")
        return out

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
        part = self._part("memory", weights, weights.memory_norm, weights.memory_kv, cache=cache[0])
        part.positions, part.cos, part.sin = cells.addresses
        part.layers, part.layer_stride = len(cache), cache.stride(0)
        part.null = None if weights.null_memory is None else weights.null_memory.data_ptr()
        part.null_rows = None if null_rows is None else null_rows.data_ptr()
        _call(self._write_memory, part, previous, previous)
        return cache

    def norm_linear(self, rows: Tensor, gain: Tensor, weight: Matrix) -> Tensor:
        """RMSNorm and product, for the head. Shapes: [B, H], weight [N, H] -> [B, N]."""
        part = self._part("head", weight, gain, weight)
        out = rows.new_empty(len(rows), len(weight))
        _call(self._norm_linear, part, rows, out)
        return out

    def _part(
        self,
        kind: str,
        owner: object,
        gain: Tensor,
        first: Matrix,
        second: Matrix | None = None,
        *,
        cache: Tensor | None = None,
    ) -> LayerPart:
        """Return the part of an owner with its weights and cache in place, made at first use."""
        key = kind, id(owner), 0 if cache is None else cache.data_ptr()
        if key in self._parts:
            return self._parts[key][1]
        part = LayerPart(gain=gain.data_ptr(), eps=self._eps, heads=self._heads, repeats=1)
        if cache is not None:
            _set_cache(part, cache)
        for name, weight in (("first", first), ("second", second)):
            if weight is not None:
                _set_weight(part, name, weight)
        self._parts[key] = owner, part
        return part

    def _run(self, function: object, part: LayerPart, hidden: Tensor, out: Tensor) -> Tensor:
        """Run a part that ends with the residual. Shapes: hidden and out [B, 1, H]."""
        part.adds = self._reduce is None
        if self._reduce is None:
            return _call(function, part, hidden, out)
        partial = _call(function, part, hidden, torch.empty_like(hidden, memory_format=torch.contiguous_format))
        return torch.add(hidden, self._reduce(partial), out=out)


def _set_weight(part: LayerPart, name: str, weight: Matrix) -> None:
    values, scales = weight, None
    if isinstance(weight, Int8Matrix):
        values, scales = weight.values, weight.scales
    assert isinstance(values, Tensor) and values.is_contiguous(), "weights lie by rows"
    setattr(part, f"{name}_values", values.data_ptr())
    setattr(part, f"{name}_scales", None if scales is None else scales.data_ptr())
    setattr(part, f"{name}_rows", values.shape[0])
    setattr(part, f"{name}_columns", values.shape[1])


def _set_cache(part: LayerPart, cache: Tensor) -> None:
    """Set the cache of one layer. Shapes: [2, B, heads, entries + 1, D]."""
    part.cache, part.kind_stride, part.slot_stride = cache.data_ptr(), cache.stride(0), cache.stride(1)
    _, _, part.cache_heads, entries, part.width = cache.shape
    part.entries = entries - 1


def _call(function, part: LayerPart, rows: Tensor, out: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Shapes: rows and out [B, ..., width], with any stride of B."""
    assert rows.stride(-1) == out.stride(-1) == 1
    part.rows, part.row_stride, part.count = rows.data_ptr(), rows.stride(0), len(rows)
    part.out, part.out_stride = out.data_ptr(), out.stride(0)
    part.threads = torch.get_num_threads()
    function(ctypes.addressof(part))
    return out
