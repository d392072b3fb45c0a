"""Arithmetic of the benchmarks on plain numbers: bounds, paired ratios, spread."""

import statistics
from collections.abc import Sequence


def shortest_pipeline(stage_times: Sequence[float], num_micro_batches: int) -> float:
    """Least time of one step on a pipeline of these stages: `(m - 1) * max(t) + sum(t)`.

    The slowest stage works on every micro-batch, and one micro-batch passes all stages.

    Args:
        stage_times: forward and backward pass of one micro-batch on each stage.
        num_micro_batches: m.
    """
    if not stage_times or min(stage_times) <= 0 or num_micro_batches < 1:
        raise ValueError(f"stage times {list(stage_times)} and micro-batches {num_micro_batches} must be positive")
    return (num_micro_batches - 1) * max(stage_times) + sum(stage_times)


def pipeline_speedup_bound(
    stage_times: Sequence[float], num_micro_batches: int, busy_times: Sequence[float] | None = None
) -> float:
    """Most that a pipeline of these stages can gain over one process, which needs `m * sum(t)`.

    Args:
        stage_times: t of each stage while nothing else runs.
        num_micro_batches: m.
        busy_times: t of each stage while all stages compute, where cores slow each other down; default: the same.
    """
    shortest = shortest_pipeline(stage_times if busy_times is None else busy_times, num_micro_batches)
    return num_micro_batches * sum(stage_times) / shortest


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratio of each round; both were measured in the same rounds, one right after the other."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes and number of repeated readings."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "quartile_low": low,
        "quartile_high": high,
        "minimum": min(values),
        "maximum": max(values),
        "repeats": len(values),
    }


def imbalance(stage_times: Sequence[float]) -> float:
    """By how much the slowest stage takes longer than the fastest, as a share: 0 when all take equally long."""
    return max(stage_times) / min(stage_times) - 1.0
