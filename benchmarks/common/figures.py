"""Arithmetic of the benchmarks on plain numbers: bounds, paired ratios, spread."""

import statistics
from collections.abc import Sequence


def pipeline_speedup_bound(
    stage_times: Sequence[float], num_micro_batches: int, busy_times: Sequence[float] | None = None
) -> float:
    """Largest possible speedup of a pipeline over one process, which needs `m * sum(t)`.

    A pipeline needs at least `(m - 1) * max(t) + sum(t)`: its slowest stage computes every micro-batch, and one
    micro-batch passes all stages.

    Args:
        stage_times: t, forward and backward pass of one micro-batch on each stage while nothing else runs.
        num_micro_batches: m.
        busy_times: t of each stage while all stages compute, where cores slow each other down; default: the same.
    """
    times = stage_times if busy_times is None else busy_times
    if not times or min(*times, *stage_times) <= 0 or num_micro_batches < 1:
        raise ValueError(f"stage times {list(times)} and micro-batches {num_micro_batches} must be positive")
    return num_micro_batches * sum(stage_times) / ((num_micro_batches - 1) * max(times) + sum(times))


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratio of each round. Both were measured in the same rounds."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes and number of repeated readings."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "quartile_low": low,
        "quartile_high": high,
        "minimum": min(values),
        "maximum": max(values),
        "repeats": len(values),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Value below which this share of the values is."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]
