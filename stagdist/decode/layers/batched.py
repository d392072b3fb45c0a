"""Sections with shared weights as rows of one batch: the weights are read once for all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stagdist.decode.layers.cells import AnyCells
from stagdist.decode.layers.runner import SectionCache, SectionMath
from stagdist.decode.layers.weights import LayerWeights, SectionWeights


class BatchedSections:
    """All sections of a model in one process, for steps. Prefill runs them one after the other on the same caches.

    Rows of one request lie together: row = slot * p + section. The sections' caches become views of one.
    """

    def __init__(self, math: SectionMath, weights: dict[int, SectionWeights], caches: dict[int, SectionCache]):
        self._math, self._weights, self._caches = math, weights, caches
        self.count = len(weights)
        like = caches[0].self_kv
        layers, two, slots, *rest = like.shape
        self._self_kv = torch.zeros(layers, two, slots * self.count, *rest, dtype=like.dtype, device=like.device)
        for section, cache in caches.items():
            cache.self_kv = self._self_kv[:, :, section :: self.count]

    def begin(self, embedded: Tensor, wide: AnyCells) -> Tensor:
        """First self-attention of all sections.

        Shapes: embedded [B, 1, H] -> [B p, 1, H]; `wide` places B p rows.
        """
        hidden = embedded.repeat_interleave(self.count, dim=0)
        return self._math.self_attention(self._weights[0].layers[0], hidden, wide, self._self_kv[0])

    def finish(
        self, hidden: Tensor, wide: AnyCells, cells: AnyCells, previous: Sequence[Tensor], null_rows: Tensor | None
    ) -> dict[int, Tensor]:
        """Everything after `begin`.

        Args:
            previous: [B, 1, H] for each section but the first.
            cells: of the B requests, for cross-attention.

        Returns: [B, 1, H], the output of each section.
        """
        memories = []
        for section, states in enumerate(previous, start=1):
            cache = self._caches[section].memory_kv
            assert cache is not None
            memories.append(self._math.write_memory(self._weights[section], states, null_rows, cells, cache))
        for index, layer in enumerate(self._weights[0].layers):
            if index:
                hidden = self._math.self_attention(layer, hidden, wide, self._self_kv[index])
            for section, memory in enumerate(memories, start=1):
                self._cross(self._weights[section].layers[index], hidden, cells, section, memory[index])
            hidden = self._math.mlp(layer, hidden)
        by_section = hidden.unflatten(0, (-1, self.count))
        return {section: by_section[:, section] for section in range(self.count)}

    def _cross(self, layer: LayerWeights, hidden: Tensor, cells: AnyCells, section: int, memory: Tensor) -> None:
        """Run the cross-attention of one section on its rows, in place. Shapes: hidden [B p, 1, H]."""
        rows = hidden.unflatten(0, (-1, self.count))[:, section]
        result = self._math.cross_attention(layer, rows, cells, memory)
        if result is not rows:
            rows.copy_(result)
