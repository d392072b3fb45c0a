"""Keys and values of earlier positions, one entry per position or, where a window bounds the sight, per window slot."""

import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.weights import Device
from stagdist.decode.topology import Limits


class SectionCache:
    """Caches of all layers of one section on this rank.

    Shapes: self_kv [L, 2, B, K, S, D], memory_kv [L, 2, B, C, W, D] with W = min(window, S); index 0 of the second
    dimension holds keys (rotated), 1 values. Entries that were never written are never seen.

    Args:
        limits: their `num_slots` are B, their `max_context` is S.
        tensor_size: ranks that share the heads.
    """

    def __init__(self, model: ModelConfig, section: int, limits: Limits, tensor_size: int, device: Device):
        layers, slots = model.section_layers[section], limits.num_slots

        def zeros(heads: int, entries: int) -> Tensor:
            # Zeros, not empty memory: a masked entry times weight zero must not be NaN.
            shape = (layers, 2, slots, heads // tensor_size, entries, model.head_width)
            return torch.zeros(shape, dtype=device.dtype, device=device.name)

        self.self_kv = zeros(model.key_value_heads, limits.max_context)
        self.memory_kv: Tensor | None = None
        if model.staggered and section > 0:
            window = min(model.cross_attention_window or limits.max_context, limits.max_context)
            self.memory_kv = zeros(model.cross_key_value_heads, window)

    @property
    def kv_bytes(self) -> int:
        """Memory held."""
        return self.self_kv.nbytes + (0 if self.memory_kv is None else self.memory_kv.nbytes)
