"""Spans become a trace, seconds per category, and the bubble."""

import json
import time
from pathlib import Path

import pytest

from stagdist.telemetry.spans import HOST_WORK, Span, SpanRecorder, bubble_share, covered_ns, merge_traces


class Clock:
    """Nanoseconds, moved by hand."""

    def __init__(self, now: int = 0) -> None:
        self.now = now

    def mark(self) -> int:
        return self.now

    def nanoseconds(self, mark: int) -> int:
        return mark


def test_spans_hold_what_ran_inside_also_when_it_raises() -> None:
    clock = Clock()
    recorder = SpanRecorder(stage=2, clock=clock)
    with recorder.span("forward", "compute", step=7):
        clock.now += 30
    with pytest.raises(RuntimeError), recorder.span("backward", "compute", step=7, stage=3):
        clock.now += 5
        raise RuntimeError
    assert recorder.spans == (Span("forward", "compute", 2, 7, 0, 30), Span("backward", "compute", 3, 7, 30, 35))


def test_host_work_is_timed_by_the_host() -> None:
    recorder = SpanRecorder(clock=Clock())
    begin_ns = time.perf_counter_ns()
    with recorder.span("host work", HOST_WORK, step=0):
        pass
    assert begin_ns <= recorder.spans[0].begin_ns <= recorder.spans[0].end_ns <= time.perf_counter_ns()


def test_spans_beyond_the_limit_are_counted() -> None:
    recorder = SpanRecorder(max_spans=2)
    for step in range(5):
        with recorder.span("forward", "compute", step=step):
            pass
    assert len(recorder.spans) == 2 and recorder.dropped == 3


def test_the_trace_file_is_what_perfetto_reads(tmp_path: Path) -> None:
    clock = Clock(time.perf_counter_ns())
    recorder = SpanRecorder(rank=1, stage=2, clock=clock)
    wall_us = time.time_ns() / 1e3
    clock.now += 1_000_000
    with recorder.span("forward", "compute", step=7):
        clock.now += 3_000
    recorder.write_trace(tmp_path / "deep" / "trace.json")
    trace = json.loads((tmp_path / "deep" / "trace.json").read_text())
    event = next(event for event in trace["traceEvents"] if event["ph"] == "X")
    assert event["ts"] == pytest.approx(wall_us + 1_000, abs=5e6)
    assert {key: event[key] for key in event if key != "ts"} == {
        "name": "forward",
        "cat": "compute",
        "ph": "X",
        "dur": 3.0,
        "pid": 1,
        "tid": 2,
        "args": {"step": 7},
    }
    labels = {event["name"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert labels == {"thread_name": "stage 2", "process_name": "rank 1"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["trace.json"]


def test_traces_of_ranks_are_merged(tmp_path: Path) -> None:
    for rank in range(2):
        recorder = SpanRecorder(rank=rank, max_spans=1)
        for step in range(2):
            with recorder.span("forward", "compute", step=step):
                pass
        recorder.write_trace(tmp_path / f"{rank}.json")
    merge_traces([tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "all.json")
    trace = json.loads((tmp_path / "all.json").read_text())
    assert {event["pid"] for event in trace["traceEvents"] if event["ph"] == "X"} == {0, 1}
    assert trace["otherData"]["dropped_spans"] == 2


def test_time_covered_by_several_spans_counts_once() -> None:
    assert covered_ns([(20, 21), (9, 12), (2, 4), (0, 10)]) == 13
    assert covered_ns([]) == 0


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 8), (4, 8), (4, 1)])
def test_the_bubble_of_the_ideal_schedule(stages: int, micro_batches: int) -> None:
    phase_s = (micro_batches + stages - 1) * 3.0
    share = bubble_share([micro_batches * 3.0] * stages, phase_s)
    assert share == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_an_unequal_stage_idles() -> None:
    assert bubble_share([8.0, 4.0], 10.0) == pytest.approx(0.4)


def test_clocks_that_differ_a_little_give_no_negative_bubble() -> None:
    assert bubble_share([1.005], 1.0) == 0.0
