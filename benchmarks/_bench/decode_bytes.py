"""What a step must read from memory, and hence how fast it could be at best."""

from dataclasses import dataclass

from torch import Tensor

from stagdist.decode.runtime.stage import Stage


@dataclass(frozen=True)
class StepBytes:
    """Read by one rank for one step: every weight once, and the caches of every request.

    Attributes:
        weights: matrices and vectors; of the embedding only the rows looked up, which do not count.
        cache: keys and values up to the present position.
    """

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.cache


def step_bytes(stage: Stage, context: int, batch: int) -> StepBytes:
    """What this rank reads in a step in which every request is at position `context`."""
    model, weights = stage.model, stage.weights
    tensors: dict[int, Tensor] = {}
    for section in weights.sections.values():
        for layer in section.layers:
            tensors |= {tensor.data_ptr(): tensor for tensor in vars(layer).values() if tensor is not None}
        tensors |= {t.data_ptr(): t for name, t in vars(section).items() if name != "layers" and t is not None}
    read = sum(tensor.nbytes for tensor in tensors.values())
    read += (
        0 if weights.head is None or weights.output_norm is None else weights.head.nbytes + weights.output_norm.nbytes
    )
    cache = 0
    for of_section in stage.caches.values():
        cache += _seen(of_section.self_kv.nbytes, of_section.self_kv.shape, context, batch)
        if of_section.memory_kv is not None:
            seen = min(context, model.cross_attention_window or context)
            cache += _seen(of_section.memory_kv.nbytes, of_section.memory_kv.shape, seen, batch)
    return StepBytes(read, cache)


def bound_s(bytes_of_ranks: list[StepBytes], bandwidths: list[float], *, sequential: bool, stages: int) -> float:
    """Shortest step: the slowest rank's bytes over its bandwidth; where stages take turns, the sum over the stages."""
    times = [each.total / bandwidth for each, bandwidth in zip(bytes_of_ranks, bandwidths, strict=True)]
    if not sequential:
        return max(times)
    width = len(times) // stages
    return sum(max(times[stage * width : (stage + 1) * width]) for stage in range(stages))


def _seen(nbytes: int, shape: tuple[int, ...], entries: int, batch: int) -> int:
    """Share of a cache [L, 2, B, heads, entries, width] that a step reads."""
    return nbytes * min(entries, shape[4]) // shape[4] * batch // shape[2]
