"""What a step reads, and how long reading takes at least."""

import statistics
from collections.abc import Sequence

from torch import Tensor

from stagdist.decode.layers.matrix import parts_of
from stagdist.decode.runtime.stage import Stage


def step_bytes(stage: Stage, context: int, batch: int) -> dict[str, int]:
    """What this rank reads in a step at position `context`: every weight once, and the caches of every request.

    Of the embedding only the rows that are looked up are read; they do not count.
    """
    model, weights = stage.model, stage.weights
    tensors: dict[int, Tensor] = {}
    cache = 0
    for section in weights.sections.values():
        for part in (*section.layers, section):
            values = [value for name, value in vars(part).items() if name != "layers" and value is not None]
            tensors |= {tensor.data_ptr(): tensor for value in values for tensor in parts_of(value)}
    head = () if weights.head is None or weights.output_norm is None else (weights.head, weights.output_norm)
    for of_section in stage.caches.values():
        window = min(context, model.cross_attention_window or context)
        for kept, seen in ((of_section.self_kv, context), (of_section.memory_kv, window)):
            if kept is not None:  # [L, 2, B, heads, entries + 1, width]
                cache += kept.nbytes // kept.shape[4] * min(seen, kept.shape[4] - 1) * batch // kept.shape[2]
    return {"weights_bytes": sum(tensor.nbytes for tensor in (*tensors.values(), *head)), "cache_bytes": cache}


def median_bandwidths(readings: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """Medians by rank over readings of `DecodeSite.read_bandwidths`: while all ranks read, and one after the other."""
    together, alone = (
        [statistics.median(rank) for rank in zip(*kind, strict=True)] for kind in zip(*readings, strict=True)
    )
    return together, alone


def bound_s(read: Sequence[int], bandwidths: Sequence[float], *, sequential: bool, stages: int) -> float:
    """Shortest step: the slowest rank's bytes over its bandwidth; where stages take turns, the sum over the stages."""
    times = [each / bandwidth for each, bandwidth in zip(read, bandwidths, strict=True)]
    if not sequential:
        return max(times)
    width = len(times) // stages
    return sum(max(times[stage * width : (stage + 1) * width]) for stage in range(stages))
