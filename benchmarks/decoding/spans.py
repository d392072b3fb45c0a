"""Where the time of a step goes, stage by stage: sums over the spans of runs with a recorder."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.decoding.contestants import DROPPED_STEPS, EngineContestant, Load
from benchmarks.decoding.site import DecodeSite
from stagdist.telemetry.clocks import Clock
from stagdist.telemetry.spans import HOST_WORK, Span, SpanRecorder, covered_ns, merge_traces

PHASES = ("self_attention", "cross_attention", "mlp")
"""Phases inside a section, as `LayerMath` names them."""
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
"""Name of each category of spans in the results."""


class PhaseClock:
    """Times the phases inside sections: the clock of a recorder, and its `lap` is called by the stage.

    The recorder takes the time where a span begins, which is where the first phase of a section begins.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, 0
        self._laps: list[tuple[str, int, int]] = []

    def mark(self) -> int:
        """Take the time; the next phase begins here."""
        self._last = self._clock.mark()
        return self._last

    def nanoseconds(self, mark: int) -> int:
        """Time of a mark on the scale of `time.perf_counter_ns`."""
        return self._clock.nanoseconds(mark)

    def lap(self, phase: str) -> None:
        """End a phase."""
        begin = self._last
        self._laps.append((phase, begin, self.mark()))

    def seconds(self, begin_ns: int, end_ns: int) -> dict[str, float]:
        """Sum of each phase between two times."""
        sums = dict.fromkeys(PHASES, 0.0)
        for phase, *marks in self._laps:
            begin, end = map(self.nanoseconds, marks)
            if begin_ns <= begin and end <= end_ns:
                sums[phase] += (end - begin) / 1e9
        return sums

    def clear(self) -> None:
        """Drop all laps."""
        self._laps.clear()


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one rank's spans, without the first ones of the request.

    Attributes:
        begin_ns: of the first step.
        end_ns: beginning of the step after the last.
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
    """Mean of each measure, of the complete step, and of the time between instructions."""
    sums = dict.fromkeys(MEASURES.values(), 0.0)
    for span in stretch.spans:
        sums[MEASURES[span.category]] += (span.end_ns - span.begin_ns) / 1e6 / stretch.steps
    inside = [(span.begin_ns, span.end_ns) for span in stretch.spans if span.begin_ns >= stretch.begin_ns]
    step_ms = 1e3 * stretch.step_s
    return {"step": step_ms, **sums, "between_instructions": step_ms - covered_ns(inside) / 1e6 / stretch.steps}


@dataclass(frozen=True)
class Instrumented:
    """Recorded steps of one contestant.

    Attributes:
        stretches: counted steps of each rank.
        breakdown: milliseconds per step of each rank.
        compute_share: of the rank that computes most, in the step.
        trace: Chrome trace of each rank as text.
        layers: of each rank's stage.
        lag: steps between sending a hand-off and needing it.
    """

    stretches: list[Stretch]
    breakdown: list[dict[str, float]]
    compute_share: float
    trace: list[str]
    layers: tuple[int, ...]
    lag: int


def instrument(site: DecodeSite, build: Callable[..., EngineContestant], load: Load, repeats: int) -> Instrumented:
    """Record several runs and keep the one whose step took the median time. All ranks call it.

    Args:
        build: makes the contestant with a recorder.
    """
    recorder = SpanRecorder(rank=site.rank, stage=site.stage, clock=site.clock())
    engine = build(recorder=recorder)
    stage, topology = engine.stage, engine.plan.topology
    runs = []
    for _ in range(repeats):
        recorder.clear()
        engine(load)
        runs.append((counted_steps(recorder.spans), _trace_text(recorder)))
    times = [stretch.step_s for stretch, _ in runs]
    stretch, trace = runs[site.from_first(times.index(statistics.median_low(times)))]
    stretches = site.gather(stretch)
    breakdown = [milliseconds_per_step(stretch) for stretch in stretches]
    # Choosing a token from a sharded head is mostly waiting for other ranks.
    own = ("compute", "head") if topology.head == "sharded" else ("compute", "head", "sampling")
    share = max(sum(each[name] for name in own) / each["step"] for each in breakdown)
    layers = sum(engine.model.section_layers[section] for section in topology.sections(stage.index))
    return Instrumented(stretches, breakdown, share, site.gather(trace), tuple(site.gather(layers)), topology.lag)


def _trace_text(recorder: SpanRecorder) -> str:
    with tempfile.TemporaryDirectory(prefix="stagdist-trace-") as folder:
        path = Path(folder) / "trace.json"
        recorder.write_trace(path)
        return path.read_text(encoding="utf-8")


def phases(
    site: DecodeSite, build: Callable[..., EngineContestant], load: Load, repeats: int
) -> list[dict[str, float]]:
    """Milliseconds per step of the phases inside sections, of each rank; medians of several runs.

    Args:
        build: makes the contestant with a recorder and a `lap`.
    """
    clock = PhaseClock(site.clock())
    recorder = SpanRecorder(rank=site.rank, clock=clock)
    engine, readings = build(recorder=recorder, lap=clock.lap), []
    for _ in range(repeats):
        recorder.clear()
        clock.clear()
        engine(load)
        stretch = counted_steps(recorder.spans)
        seconds = clock.seconds(stretch.begin_ns, stretch.end_ns)
        readings.append({name: 1e3 * each / stretch.steps for name, each in seconds.items()})
    return site.gather({name: statistics.median(reading[name] for reading in readings) for name in PHASES})


def with_phases(breakdown: Sequence[dict[str, float]], of_ranks: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """One table per rank for the results."""
    return [
        {f"{name}_ms": value for name, value in (each | inside).items()} | {"stage": stage}
        for stage, (each, inside) in enumerate(zip(breakdown, of_ranks, strict=True))
    ]


def write_traces(traces: Sequence[str], target: str | Path) -> None:
    """Merge the traces of all ranks and runs into one file."""
    with tempfile.TemporaryDirectory(prefix="stagdist-trace-") as folder:
        paths = [Path(folder) / f"{index}.json" for index in range(len(traces))]
        for path, text in zip(paths, traces, strict=True):
            path.write_text(text, encoding="utf-8")
        merge_traces(paths, target)
