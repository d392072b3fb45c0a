"""Timed spans of work: a trace for Perfetto or chrome://tracing, seconds per category, the pipeline bubble."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

MAX_SPANS = 1_000_000
"""Spans kept by default, about 200 MB; later ones are counted and left out."""

BUBBLE_TOLERANCE = 0.01
"""Computing may exceed its phase by this share before it counts as a mistake: two clocks are compared."""


class Span(NamedTuple):
    """One stretch of work on one stage, nanoseconds of the recorder's clock."""

    name: str
    category: str
    stage: int
    step: int
    begin_ns: int
    end_ns: int


class SpanRecorder:
    """Records spans of one process; does next to nothing when it is switched off.

    Args:
        rank: global rank, the process number of the trace.
        stage: stage of spans that name none.
        enabled: False records nothing.
        synchronize: called before each reading of the clock. Work on a GPU runs after the call that starts it has
            returned; give `torch.cuda.synchronize` where spans must hold it.
        max_spans: spans kept at most.
        clock_ns: nanoseconds from any origin, never going back.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        stage: int = 0,
        enabled: bool = True,
        synchronize: Callable[[], None] | None = None,
        max_spans: int = MAX_SPANS,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.enabled = enabled
        self.dropped = 0
        self._rank = rank
        self._stage = stage
        self._synchronize = synchronize
        self._max_spans = max_spans
        self._clock_ns = clock_ns
        # Traces of several ranks are laid over each other by wall-clock time.
        self._wall_offset_ns = time.time_ns() - clock_ns()
        self._spans: list[Span] = []

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans so far, in the order in which they ended."""
        return tuple(self._spans)

    def begin(self) -> int:
        """Time at which a span begins, for `end`; 0 when switched off."""
        return self._now() if self.enabled else 0

    def end(self, begin_ns: int, name: str, category: str, *, step: int, stage: int | None = None) -> None:
        """Record the span that began at `begin_ns` and ends now."""
        if not self.enabled:
            return
        if len(self._spans) >= self._max_spans:
            self.dropped += 1
            return
        self._spans.append(Span(name, category, self._stage if stage is None else stage, step, begin_ns, self._now()))

    def span(self, name: str, category: str, *, step: int, stage: int | None = None) -> AbstractContextManager[None]:
        """Context manager that records what runs inside as one span, also when it raises."""
        if not self.enabled:
            return nullcontext()
        return self._timed(name, category, step, stage)

    def clear(self) -> None:
        """Forget all spans."""
        self._spans.clear()
        self.dropped = 0

    def write_trace(self, path: str | Path) -> None:
        """Write the spans as a Chrome trace (JSON), aside and then renamed.

        One process per rank, one thread per stage, wall-clock microseconds.
        """
        events = [self._event(span) for span in self._spans]
        for stage in sorted({span.stage for span in self._spans}):
            events.append(_label("thread_name", self._rank, stage, f"stage {stage}"))
        events.append(_label("process_name", self._rank, 0, f"rank {self._rank}"))
        _write_trace_file(Path(path), events, {"dropped_spans": self.dropped})

    def _now(self) -> int:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock_ns()

    @contextmanager
    def _timed(self, name: str, category: str, step: int, stage: int | None) -> Any:
        begin_ns = self._now()
        try:
            yield
        finally:
            self.end(begin_ns, name, category, step=step, stage=stage)

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


def seconds_per_step(spans: Iterable[Span]) -> dict[int, dict[str, float]]:
    """Seconds of each category in each step: `{step: {category: seconds}}`.

    Time covered by several spans of one category (nested ones, or stages of one process) counts once.
    """
    intervals: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for span in spans:
        intervals.setdefault((span.step, span.category), []).append((span.begin_ns, span.end_ns))
    seconds: dict[int, dict[str, float]] = {}
    for (step, category), stretches in sorted(intervals.items()):
        seconds.setdefault(step, {})[category] = _covered_ns(stretches) / 1e9
    return seconds


def bubble_share(compute_s: Sequence[float], phase_s: float) -> float:
    """Share of the pipelined phase in which a stage does not compute, mean over the stages.

    The ideal 1F1B schedule of m micro-batches on p equal stages gives (p - 1) / (m + p - 1).

    Args:
        compute_s: seconds each stage computes inside the phase, one number per stage.
        phase_s: seconds from the first stage's first micro-batch to the last gradient.

    Raises:
        ValueError: no stage, an empty phase, or a stage that computes longer than the phase lasts.
    """
    if not compute_s:
        raise ValueError("compute_s is empty; give the seconds of at least one stage")
    if not phase_s > 0:
        raise ValueError(f"phase_s is {phase_s}; a pipelined phase takes time")
    for stage, seconds in enumerate(compute_s):
        if not 0 <= seconds <= phase_s * (1 + BUBBLE_TOLERANCE):
            raise ValueError(f"stage {stage} computes {seconds} s in a phase of {phase_s} s")
    return max(0.0, 1.0 - sum(compute_s) / (len(compute_s) * phase_s))


def _covered_ns(stretches: list[tuple[int, int]]) -> int:
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
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms", "otherData": notes}, file)
    os.replace(aside, path)
