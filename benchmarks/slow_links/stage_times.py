"""What the formula of `stagdist.planning.decode_steps` needs, from recorded steps without an injected latency."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.decoding.spans import Stretch
from stagdist.planning.decode_steps import Cycle, StageWork, pipeline_cycles
from stagdist.telemetry.spans import Span

TOKEN, HAND_OFF, SENT, PUBLISHED, HEAD = "wait for token", "wait for memory", "send hand-off", "publish token", "head"
"""Names of instructions, as their spans have them."""


@dataclass(frozen=True)
class RecordedTimes:
    """Mean times of a pipeline's steps, since what they predict is a mean step.

    Attributes:
        stages: first to last.
        end_s: head, choice, and what is between them.
        message_s: from a send to the end of the wait for it.
    """

    stages: tuple[StageWork, ...]
    end_s: float
    message_s: float

    def cycles(self, stagger: int, *, sequential: bool) -> tuple[Cycle, ...]:
        """Cycles of the schedule with these times."""
        return pipeline_cycles(self.stages, self.end_s, stagger, sequential=sequential)


def recorded_times(stretches: Sequence[Stretch], lag: int) -> RecordedTimes:
    """Times from the spans of one run; one section per stage, the head on the last of several stages.

    Args:
        stretches: of each stage.
        lag: steps between sending a hand-off and needing it; 0 only for a sequential model.
    """
    steps = [_by_step(stretch) for stretch in stretches]
    last = len(steps) - 1
    stages = tuple(_stage(of, stage, last, sequential=lag == 0) for stage, of in enumerate(steps))
    end_s = _mean_s(of[PUBLISHED].begin_ns - of[HEAD].begin_ns for of in steps[last].values())
    trips = [
        trip
        for stage, receiver in enumerate(steps)
        for name, sent, sender, late in (
            (TOKEN, PUBLISHED, steps[last], 0),
            (HAND_OFF, SENT, steps[stage - 1] if stage else {}, lag),
        )
        for trip in _trips(sender, receiver, sent, name, late)
    ]
    return RecordedTimes(stages, end_s, _mean_s(trips) if trips else 0.0)


def median_times(readings: Sequence[RecordedTimes]) -> RecordedTimes:
    """Medians over several runs."""
    stages = zip(*(each.stages for each in readings), strict=True)
    return RecordedTimes(
        tuple(
            StageWork(
                statistics.median(each.begin_s for each in of),
                statistics.median(each.rest_s for each in of),
                statistics.median(each.after_s for each in of),
            )
            for of in stages
        ),
        statistics.median(each.end_s for each in readings),
        statistics.median(each.message_s for each in readings),
    )


def _stage(steps: Mapping[int, Mapping[str, Span]], stage: int, last: int, *, sequential: bool) -> StageWork:
    begins, rests, afters = [], [], []
    output, end = (HEAD, PUBLISHED) if stage == last else (SENT, TOKEN)
    run = f"run section {stage + 1}"
    for step, of in steps.items():
        if step - 1 not in steps:
            continue
        known_ns, split_ns, resumed_ns = steps[step - 1][end].end_ns, of[run].begin_ns, of[run].begin_ns
        if stage and sequential:
            known_ns = of[HAND_OFF].end_ns
        elif stage:
            split_ns, resumed_ns = of[HAND_OFF].begin_ns, of[HAND_OFF].end_ns
        begins.append(split_ns - known_ns)
        rests.append(of[output].begin_ns - resumed_ns)
        afters.append(of[end].end_ns - of[end].begin_ns if stage == last else of[end].begin_ns - of[output].begin_ns)
    return StageWork(_mean_s(begins), _mean_s(rests), _mean_s(afters))


def _trips(
    sender: Mapping[int, Mapping[str, Span]], receiver: Mapping[int, Mapping[str, Span]], sent: str, name: str, lag: int
) -> list[int]:
    """Nanoseconds of the messages that were waited for before they were sent."""
    pairs = [(sender[step][sent], receiver[step + lag].get(name)) for step in sender if step + lag in receiver]
    return [wait.end_ns - send.begin_ns for send, wait in pairs if wait is not None and wait.begin_ns < send.begin_ns]


def _by_step(stretch: Stretch) -> dict[int, dict[str, Span]]:
    found: dict[int, dict[str, Span]] = {}
    for span in stretch.spans:
        found.setdefault(span.step, {})[span.name] = span
    return found


def _mean_s(times_ns) -> float:  # type: ignore[no-untyped-def]
    return statistics.fmean(times_ns) / 1e9
