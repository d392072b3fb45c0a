"""How long a step of decoding takes over slow links: a formula of stage times, one-way latency and stagger.

Steps repeat, so the events of a step form a graph whose arcs carry a time and the number of steps that they span:

- a stage begins step i when it knows token i - 1 (one latency late, except on the last stage), has the control message
  of rank 0 for the step (sent when rank 0 began step i - 1), and has completed its own step i - 1;
- its output follows after its own work, and after the hand-off of step i - L from the stage before, one latency late;
- the token follows after the last stage's output and the end of the step.

The steady time of a step is the largest ratio, over all cycles of this graph, of the cycle's time to its steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stagdist.errors import ConfigError

Event = tuple[str, int]
"""What happens (`begin`, `output`, `done` or `token`) and on which stage."""


@dataclass(frozen=True)
class StageWork:
    """Work of one stage in a step, in seconds.

    Attributes:
        begin_s: between the token and the use of the hand-off: embedding and first self-attention.
        rest_s: from there to the stage's output.
        after_s: after the output, before the stage can take up another token: host work, or the calls of publishing.
    """

    begin_s: float
    rest_s: float
    after_s: float = 0.0


@dataclass(frozen=True)
class Cycle:
    """Events that depend on each other in a circle.

    Attributes:
        events: each depends on the one before.
        work_s: computing and ends of steps.
        messages: latencies on the way.
        steps: number of steps that the cycle spans.
    """

    events: tuple[Event, ...]
    work_s: float
    messages: int
    steps: int

    def step_s(self, latency_s: float) -> float:
        """Step time if only this cycle limits it."""
        return (self.work_s + self.messages * latency_s) / self.steps


@dataclass(frozen=True)
class _Arc:
    source: Event
    target: Event
    work_s: float
    messages: int
    steps: int


def section_s(read_bytes: float, bandwidth: float, launches_s: float = 0.0) -> float:
    """Shortest time of a section: its bytes over the memory's bandwidth, or the launches of its kernels."""
    return max(read_bytes / bandwidth, launches_s)


def pipeline_cycles(
    stages: Sequence[StageWork], end_s: float, stagger: int, *, sequential: bool = False
) -> tuple[Cycle, ...]:
    """All cycles of a pipeline that decodes, with the head on its last stage.

    Args:
        stages: first to last.
        end_s: from the last stage's output to the published token: head and choice.
        stagger: steps between a hand-off's departure and its use; 0 for none.
        sequential: nothing is computed before the hand-off is there.

    Raises:
        ConfigError: there are no stages, a negative time, or a stagger below 0.
    """
    times = [time for each in stages for time in (each.begin_s, each.rest_s, each.after_s)]
    if not stages or min([*times, end_s]) < 0 or stagger < 0 or (sequential and stagger):
        raise ConfigError(f"no steps of {len(stages)} stages, times {[*times, end_s]} and stagger {stagger}")
    return tuple(_cycles(list(_arcs(stages, end_s, stagger, sequential))))


def pipeline_step_s(cycles: Sequence[Cycle], latency_s: float) -> tuple[float, Cycle]:
    """Steady time of a step at a one-way latency, and the cycle that sets it."""
    slowest = max(cycles, key=lambda cycle: cycle.step_s(latency_s))
    return slowest.step_s(latency_s), slowest


def flat_until_s(cycles: Sequence[Cycle]) -> float:
    """The latency up to which steps take as long as without any: the slack of the schedule in one direction."""
    flat_s = pipeline_step_s(cycles, 0.0)[0]
    limits = [(flat_s * each.steps - each.work_s) / each.messages for each in cycles if each.messages]
    return max(0.0, min(limits, default=float("inf")))


def tensor_parallel_step_s(step_s: float, collectives: int, latency_s: float) -> float:
    """Time of a step whose collectives each take one latency longer; `step_s` without latency."""
    return step_s + collectives * latency_s


def _arcs(stages: Sequence[StageWork], end_s: float, stagger: int, sequential: bool) -> Iterator[_Arc]:
    last = len(stages) - 1
    yield _Arc(("output", last), ("token", last), end_s, 0, 0)
    for stage, times in enumerate(stages):
        begin, output, done = (("begin", stage), ("output", stage), ("done", stage))
        yield _Arc(begin, output, times.begin_s + times.rest_s, 0, 0)
        yield _Arc(("token", last) if stage == last else output, done, times.after_s, 0, 0)
        yield _Arc(done, begin, 0.0, 0, 1)
        if stage < last:
            yield _Arc(("token", last), begin, 0.0, 1, 1)
        if stage > 0:
            work_s = times.rest_s + (times.begin_s if sequential else 0.0)
            yield _Arc(("output", stage - 1), output, work_s, 1, stagger)
            yield _Arc(("begin", 0), begin, 0.0, 1, 1)  # control


def _cycles(arcs: Sequence[_Arc]) -> Iterator[Cycle]:
    """Every simple cycle once, from its smallest event on."""
    leaving: dict[Event, list[_Arc]] = {}
    for arc in arcs:
        leaving.setdefault(arc.source, []).append(arc)

    def follow(path: list[_Arc], start: Event) -> Iterator[Cycle]:
        here = path[-1].target if path else start
        for arc in leaving.get(here, ()):
            if arc.target == start:
                found = [*path, arc]
                yield Cycle(
                    tuple(each.source for each in found),
                    sum(each.work_s for each in found),
                    sum(each.messages for each in found),
                    sum(each.steps for each in found),
                )
            elif arc.target > start and all(arc.target != each.source for each in path):
                yield from follow([*path, arc], start)

    for start in sorted(leaving):
        yield from follow([], start)
