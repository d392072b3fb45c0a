"""Timed spans of work: a trace for Perfetto or chrome://tracing, seconds per category, the pipeline bubble."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stagdist.files import writing
from stagdist.telemetry.clocks import Clock, HostClock

HOST_WORK = "host work"
"""Category of spans that hold no work of a device."""

MAX_SPANS = 1_000_000
"""Spans kept by default, about 200 MB; later ones are counted and left out."""


class Span(NamedTuple):
    """One stretch of work on one stage, in nanoseconds of `time.perf_counter_ns`."""

    name: str
    category: str
    stage: int
    step: int
    begin_ns: int
    end_ns: int


class SpanRecorder:
    """Records spans of one process.

    Args:
        rank: global rank, the process number of the trace.
        stage: stage of spans that name none.
        clock: times the spans; `EventClock` where they hold work of a GPU. Host work is always timed by the host.
    """

    def __init__(
        self, *, rank: int = 0, stage: int = 0, clock: Clock | None = None, max_spans: int = MAX_SPANS
    ) -> None:
        self.dropped = 0
        self._rank = rank
        self._stage = stage
        self._clock = clock or HostClock()
        self._host_clock = HostClock()
        self._max_spans = max_spans
        # Traces of several ranks are laid over each other by wall-clock time.
        self._wall_offset_ns = time.time_ns() - time.perf_counter_ns()
        self._marked: list[Span] = []

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans so far, in the order in which they ended. Waits for work of a GPU that they hold."""
        return tuple(
            span._replace(begin_ns=clock.nanoseconds(span.begin_ns), end_ns=clock.nanoseconds(span.end_ns))
            for span in self._marked
            for clock in [self._clock_of(span.category)]
        )

    @contextmanager
    def span(self, name: str, category: str, *, step: int, stage: int | None = None) -> Iterator[None]:
        """Context manager that records what runs inside as one span, also when it raises."""
        if len(self._marked) >= self._max_spans:
            self.dropped += 1
            yield
            return
        clock = self._clock_of(category)
        begin = clock.mark()
        try:
            yield
        finally:
            where = self._stage if stage is None else stage
            self._marked.append(Span(name, category, where, step, begin, clock.mark()))

    def clear(self) -> None:
        """Drop all spans."""
        self._marked.clear()
        self.dropped = 0

    def write_trace(self, path: str | Path) -> None:
        """Write the spans as a Chrome trace (JSON), aside and then renamed.

        One process per rank, one thread per stage, wall-clock microseconds.
        """
        events = [self._event(span) for span in self.spans]
        for stage in sorted({span.stage for span in self._marked}):
            events.append(_label("thread_name", self._rank, stage, f"stage {stage}"))
        events.append(_label("process_name", self._rank, 0, f"rank {self._rank}"))
        _write_trace_file(Path(path), events, {"dropped_spans": self.dropped})

    def _clock_of(self, category: str) -> Clock:
        return self._host_clock if category == HOST_WORK else self._clock

    def _event(self, span: Span) -> dict[str, Any]:
        return {
            "name": span.name,
            "cat": span.category,
            "ph": "X",
            "ts": (span.begin_ns + self._wall_offset_ns) / 1e3,
            "dur": (span.end_ns - span.begin_ns) / 1e3,
            "pid": self._rank,
            "tid": span.stage,
            "args": {"step": span.step},
        }


def merge_traces(sources: Sequence[str | Path], target: str | Path) -> None:
    """Lay the traces of several ranks into one file."""
    events: list[dict[str, Any]] = []
    dropped = 0
    for source in sources:
        trace = json.loads(Path(source).read_text(encoding="utf-8"))
        events += trace["traceEvents"]
        dropped += trace["otherData"]["dropped_spans"]
    _write_trace_file(Path(target), events, {"dropped_spans": dropped})


def bubble_share(compute_s: Sequence[float], phase_s: float) -> float:
    """Share of the pipelined phase in which a stage does not compute, mean over the stages.

    The ideal 1F1B schedule of m micro-batches on p equal stages gives (p - 1) / (m + p - 1).

    Args:
        compute_s: seconds each stage computes inside the phase, one number per stage.
        phase_s: seconds from the first stage's first micro-batch to the last gradient.
    """
    # The two are timed by different clocks, so a stage may seem to compute a little longer than the phase.
    return max(0.0, 1.0 - sum(compute_s) / (len(compute_s) * phase_s))


def covered_ns(stretches: Iterable[tuple[int, int]]) -> int:
    """Time that at least one of the stretches, each (begin, end), covers."""
    covered, reached = 0, None
    for begin, end in sorted(stretches):
        if reached is None or begin > reached:
            covered, reached = covered + end - begin, end
        elif end > reached:
            covered, reached = covered + end - reached, end
    return covered


def _label(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _write_trace_file(path: Path, events: list[dict[str, Any]], notes: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms", "otherData": notes}, file)
