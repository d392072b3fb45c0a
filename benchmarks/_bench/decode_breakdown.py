"""Where the time of a step goes, stage by stage: sums over the spans of instrumented runs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks._bench.decode_contestants import DROPPED_STEPS
from stagdist.telemetry.clocks import Clock
from stagdist.telemetry.spans import HOST_WORK, Span, covered_ns

PHASES = ("self_attention", "cross_attention", "mlp")
"""Phases inside a section, as `SectionRunner` calls them."""
MEASURES = {
    "compute": "compute",
    "combine": "combine",
    "head": "head",
    "sampling": "sampling",
    HOST_WORK: "host_work",
    "wait for memory": "wait_for_memory",
    "wait for last section": "wait_for_last_section",
    "wait for token": "wait_for_token",
    "send": "communication_calls",
}
"""What each category of spans is called in results."""


class PhaseClock:
    """Time of the phases inside sections: give it to a recorder as its clock, and `lap` to the stage.

    The recorder takes the time where a span begins, which is where the first phase of a section begins.

    Args:
        clock: takes the time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = 0
        self._laps: list[tuple[str, int, int]] = []

    def mark(self) -> int:
        """Take the time; the next phase begins here."""
        self._last = self._clock.mark()
        return self._last

    def nanoseconds(self, mark: int) -> int:
        """Time of a mark on the scale of `time.perf_counter_ns`."""
        return self._clock.nanoseconds(mark)

    def lap(self, phase: str) -> None:
        """A phase ends."""
        begin = self._last
        self._laps.append((phase, begin, self.mark()))

    def seconds(self, begin_ns: int, end_ns: int) -> dict[str, float]:
        """Sum of each phase in a stretch of time."""
        sums = dict.fromkeys(PHASES, 0.0)
        for phase, *marks in self._laps:
            begin, end = map(self.nanoseconds, marks)
            if begin_ns <= begin and end <= end_ns:
                sums[phase] += (end - begin) / 1e9
        return sums

    def clear(self) -> None:
        """Forget all laps."""
        self._laps.clear()


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one rank's spans, without the first ones of the request.

    Attributes:
        spans: of these steps.
        begin_ns: of the first step.
        end_ns: beginning of the step after the last.
        steps: number of steps.
    """

    spans: tuple[Span, ...]
    begin_ns: int
    end_ns: int
    steps: int

    @property
    def step_s(self) -> float:
        """Mean time of a step."""
        return (self.end_ns - self.begin_ns) / 1e9 / self.steps


def counted_steps(spans: Sequence[Span]) -> Stretch:
    """The steps of one request that count.

    Raises:
        ValueError: fewer steps than are dropped.
    """
    begins: dict[int, int] = {}
    for span in spans:
        if span.category != HOST_WORK:  # the host is ahead of a GPU
            begins[span.step] = min(span.begin_ns, begins.get(span.step, span.begin_ns))
    kept = sorted(begins)[DROPPED_STEPS:]
    if len(kept) < 2:
        raise ValueError(f"{len(begins)} steps were recorded, {DROPPED_STEPS + 2} are needed")
    inside = tuple(span for span in spans if kept[0] <= span.step < kept[-1])
    return Stretch(inside, begins[kept[0]], begins[kept[-1]], len(kept) - 1)


def milliseconds_per_step(stretch: Stretch) -> dict[str, float]:
    """Mean of each measure, of the whole step, and of what lies between instructions."""
    sums = dict.fromkeys(MEASURES.values(), 0.0)
    for span in stretch.spans:
        sums[MEASURES[span.category]] += (span.end_ns - span.begin_ns) / 1e6 / stretch.steps
    step_ms = 1e3 * stretch.step_s
    inside = [(span.begin_ns, span.end_ns) for span in stretch.spans if span.begin_ns >= stretch.begin_ns]
    covered_ms = covered_ns(inside) / 1e6 / stretch.steps
    return {"step": step_ms, **sums, "between_instructions": step_ms - covered_ms}


def own_milliseconds(of_stage: dict[str, float], *, sharded_head: bool) -> float:
    """What a stage computes itself in a step; choosing a token from a sharded head is mostly waiting for others."""
    return of_stage["compute"] + of_stage["head"] + (0.0 if sharded_head else of_stage["sampling"])


def hand_off_slack_s(sender: Stretch, receiver: Stretch, lag: int) -> float:
    """Time between a hand-off's departure and the moment at which its receiver would wait for it, median.

    Args:
        sender: stretch of the stage before; clocks of both agree.
        lag: steps between sending and needing.
    """
    left = {span.step: span.begin_ns for span in sender.spans if span.name == "send hand-off"}
    needed = {span.step: span.begin_ns for span in receiver.spans if span.name == "wait for memory"}
    slacks = [(needed[step + lag] - begin) / 1e9 for step, begin in left.items() if step + lag in needed]
    return statistics.median(slacks)
