"""Step times over the latency of a link: measured beside predicted, and where curves cross."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.figures import spread

FLAT = 1.05
"""A curve counts as flat while it is at most this many times its first value."""


@dataclass(frozen=True)
class Curve:
    """One contestant.

    Attributes:
        name: of the contestant.
        split: of its sections, such as `10+6`.
        ms: mean step of each round, by latency.
        predicted_ms: from readings without an injected latency, by latency.
        inputs: of the prediction.
    """

    name: str
    split: str
    ms: Sequence[Sequence[float]]
    predicted_ms: Sequence[float]
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def medians(self) -> list[float]:
        """Over the rounds."""
        return [statistics.median(rounds) for rounds in self.ms]

    @property
    def errors(self) -> list[float]:
        """Predicted over measured, its distance from 1."""
        return [abs(each / median - 1) for each, median in zip(self.predicted_ms, self.medians, strict=True)]

    def described(self, delays_ms: Sequence[float]) -> dict[str, Any]:
        """For the results."""
        return {
            "name": self.name,
            "split": self.split,
            "ms_per_token": self.medians,
            "spread_ms": [spread(rounds) for rounds in self.ms],
            "predicted_ms": list(self.predicted_ms),
            "prediction_error": self.errors,
            "measured_flat_until_ms": flat_until(delays_ms, self.medians),
            "inputs": self.inputs,
        }


def crossing(delays: Sequence[float], ours: Sequence[float], rival: Sequence[float]) -> float | str:
    """The latency from which on ours is the faster one, between points on a line; `from zero` or `never`."""
    leads = [theirs - own for own, theirs in zip(ours, rival, strict=True)]
    behind = [place for place, lead in enumerate(leads) if lead <= 0]
    if not behind:
        return "from zero"
    if behind[-1] == len(leads) - 1:
        return "never"
    place = behind[-1]
    share = -leads[place] / (leads[place + 1] - leads[place])
    return delays[place] + share * (delays[place + 1] - delays[place])


def flat_until(delays: Sequence[float], times: Sequence[float]) -> float | None:
    """Latency at which a curve, interpolated linearly, first exceeds `FLAT` times its first value; None if never."""
    limit = FLAT * times[0]
    for (delay, time), (next_delay, next_time) in itertools.pairwise(zip(delays, times, strict=True)):
        if next_time > limit:
            return delay + (limit - time) / (next_time - time) * (next_delay - delay)
    return None


def crossings(delays: Sequence[float], curves: Sequence[Curve]) -> dict[str, dict[str, float | str]]:
    """Of each staggered curve with each of the others."""
    return {
        ours.name: {
            rival.name: crossing(delays, ours.medians, rival.medians)
            for rival in curves
            if not rival.name.startswith("staggered")
        }
        for ours in curves
        if ours.name.startswith("staggered")
    }
