"""Keys and values of earlier positions, one entry per position or, where a window bounds the sight, per window slot."""

import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.weights import Device


class SectionCache:
    """Caches of all layers of one section on this rank.

    Shapes: self_kv [L, 2, B, K, S, D], memory_kv [L, 2, B, C, W, D] with W = min(window, S); index 0 of the second
    dimension holds keys (rotated), 1 values. Entries that were never written are never seen.

    Args:
        layers: layers of the section.
        has_memory: the section looks at an earlier one.
        num_slots: requests at a time (B).
        capacity: positions of a request (S).
        tensor_size: ranks that share the heads.
    """

    def __init__(
        self,
        model: ModelConfig,
        layers: int,
        *,
        has_memory: bool,
        num_slots: int,
        capacity: int,
        tensor_size: int,
        device: Device,
    ):
        options = {"dtype": device.dtype, "device": device.name}
        heads, width = model.key_value_heads // tensor_size, model.head_width
        # Zeros, not empty memory: a masked entry times weight zero must not be NaN.
        self.self_kv = torch.zeros(layers, 2, num_slots, heads, capacity, width, **options)  # type: ignore[call-overload]
        self.window = min(model.cross_attention_window or capacity, capacity)
        self.memory_kv: Tensor | None = None
        if has_memory:
            heads = model.cross_key_value_heads // tensor_size
            self.memory_kv = torch.zeros(layers, 2, num_slots, heads, self.window, width, **options)  # type: ignore[call-overload]

    @property
    def kv_bytes(self) -> int:
        """Memory held."""
        return self.self_kv.nbytes + (0 if self.memory_kv is None else self.memory_kv.nbytes)
