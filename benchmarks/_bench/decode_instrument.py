"""Runs with a recorder, apart from the timed ones: the breakdown of a step, the trace and the picture."""

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._bench.decode_breakdown import (
    PHASES,
    PhaseClock,
    Stretch,
    counted_steps,
    hand_off_slack_s,
    milliseconds_per_step,
    own_milliseconds,
)
from benchmarks._bench.decode_contestants import EngineContestant, Load
from benchmarks._bench.decode_site import DecodeSite
from stagdist.telemetry.spans import Span, SpanRecorder, merge_traces


@dataclass(frozen=True)
class Instrumented:
    """One contestant's steps, looked into.

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

    def slacks_s(self) -> list[float]:
        """Time a hand-off may take without anybody waiting, of each edge from the first stage on."""
        return [hand_off_slack_s(above, below, self.lag) for above, below in itertools.pairwise(self.stretches)]


def instrument(site: DecodeSite, engine: EngineContestant, load: Load, repeats: int) -> Instrumented:
    """Record several runs and keep the one whose step took the median time. All ranks call it."""
    stage = engine.stage
    recorders = []
    for _ in range(repeats):
        recorder = SpanRecorder(rank=site.rank, stage=stage.index, clock=site.clock())
        stage.recorder = recorder
        engine(load)
        recorders.append(recorder)
    stage.recorder = None
    times = [counted_steps(recorder.spans).step_s for recorder in recorders]
    chosen = recorders[site.from_first(times.index(statistics.median_low(times)))]
    stretches = site.gather(counted_steps(chosen.spans))
    breakdown = [milliseconds_per_step(stretch) for stretch in stretches]
    sharded = engine.placement.topology.head == "sharded"
    share = max(own_milliseconds(each, sharded_head=sharded) / each["step"] for each in breakdown)
    topology = engine.placement.topology
    layers = sum(engine.model.section_layers[section] for section in topology.sections(stage.index))
    traces, counts = site.gather(_trace_text(chosen)), tuple(site.gather(layers))
    return Instrumented(stretches, breakdown, share, traces, counts, topology.lag)


def phases(
    site: DecodeSite, engine: EngineContestant, clock: PhaseClock, load: Load, repeats: int
) -> list[dict[str, float]]:
    """Milliseconds per step of the phases inside sections, of each rank, from runs of their own; medians.

    Args:
        engine: made with `clock.lap`.
    """
    readings = []
    for _ in range(repeats):
        recorder = SpanRecorder(rank=site.rank, clock=clock)
        engine.stage.recorder = recorder
        clock.clear()
        engine(load)
        stretch = counted_steps(recorder.spans)
        readings.append(
            {
                name: 1e3 * seconds / stretch.steps
                for name, seconds in clock.seconds(stretch.begin_ns, stretch.end_ns).items()
            }
        )
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


def lanes(instrumented: Instrumented) -> list[tuple[Span, ...]]:
    """Spans of each rank, for a timeline."""
    return [stretch.spans for stretch in instrumented.stretches]


def _trace_text(recorder: SpanRecorder) -> str:
    with tempfile.TemporaryDirectory(prefix="stagdist-trace-") as folder:
        path = Path(folder) / "trace.json"
        recorder.write_trace(path)
        return path.read_text(encoding="utf-8")
