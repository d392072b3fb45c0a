"""Events of a GPU become nanoseconds, played on a device that runs behind its host."""

import time
from dataclasses import dataclass, field

import numpy
import pytest

from stagdist.telemetry import clocks
from stagdist.telemetry.clocks import EventClock
from stagdist.telemetry.spans import Span, SpanRecorder


@dataclass
class Device:
    """What CUDA does with events: the host enqueues work and events, the device gets to them later.

    Attributes:
        now_ms: where the device is.
        enqueued_ms: where it is when everything enqueued is done.
        waited_for: events that the host waited for.
    """

    now_ms: float = 0.0
    enqueued_ms: float = 0.0
    waited_for: "list[Event]" = field(default_factory=list)

    def work(self, milliseconds: float) -> None:
        self.enqueued_ms += milliseconds

    def new_event(self) -> "Event":
        return Event(self)


class Event:
    """The methods of `torch.cuda.Event` that a clock uses, float32 milliseconds among them."""

    def __init__(self, device: Device) -> None:
        self.device, self.at_ms = device, -1.0

    def record(self) -> None:
        self.at_ms = self.device.enqueued_ms

    def query(self) -> bool:
        return self.at_ms <= self.device.now_ms

    def synchronize(self) -> None:
        self.device.waited_for.append(self)
        self.device.now_ms = max(self.device.now_ms, self.at_ms)

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "CUDA refuses to read an event that is not complete"
        return float(numpy.float32(end.at_ms - self.at_ms))


def test_spans_hold_the_work_of_the_device_and_nothing_waits_before_they_are_read() -> None:
    device = Device()
    recorder = SpanRecorder(clock=EventClock(device.new_event))
    made = len(device.waited_for)
    for milliseconds in (3.0, 0.5):
        with recorder.span("run section", "compute", step=1):
            device.work(milliseconds)
    assert len(device.waited_for) == made
    first, second = recorder.spans
    assert len(device.waited_for) == made + 1 and device.now_ms == 3.5
    assert first.end_ns - first.begin_ns == 3_000_000 and second.begin_ns == first.end_ns
    assert second.end_ns - second.begin_ns == 500_000
    assert abs(first.begin_ns - time.perf_counter_ns()) < 60e9, "the scale is the host's"


def test_spans_that_are_read_between_others_stay_the_same() -> None:
    device = Device()
    recorder = SpanRecorder(clock=EventClock(device.new_event))
    seen: tuple[Span, ...] = ()
    for _ in range(5):
        with recorder.span("run section", "compute", step=1):
            device.work(40.0)
        assert recorder.spans[:-1] == seen
        seen = recorder.spans
    begins = [span.begin_ns - seen[0].begin_ns for span in seen]
    assert begins == [index * 40_000_000 for index in range(5)]


def test_microseconds_survive_hours() -> None:
    device = Device()
    clock = EventClock(device.new_event)
    marks = []
    for _ in range(2_000):
        marks.append(clock.mark())
        device.work(3_600.0)
    device.work(0.003)
    marks.append(clock.mark())
    times_ns = [clock.nanoseconds(mark) for mark in marks]
    assert times_ns == sorted(times_ns)
    assert times_ns[-1] - times_ns[-2] == pytest.approx(3.600003e9, abs=500)
    assert times_ns[-1] - times_ns[0] == pytest.approx(7_200_000_003_000, rel=1e-7)


def test_few_events_are_kept_while_the_device_keeps_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "MAX_PENDING", 10)
    device = Device()
    clock = EventClock(device.new_event)
    made = len(device.waited_for)
    for _ in range(100):
        device.work(1.0)
        device.now_ms = device.enqueued_ms - 3.0  # three marks behind the host
        assert len(clock._pending) <= 10
        last = clock.mark()
    assert len(device.waited_for) == made
    assert clock.nanoseconds(last) - clock.nanoseconds(0) == 99_000_000


def test_a_device_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "MAX_PENDING", 4)
    device = Device()
    clock = EventClock(device.new_event)
    made = len(device.waited_for)
    for _ in range(20):
        device.work(1.0)
        clock.mark()
    assert len(device.waited_for) == made and len(clock._pending) == 20
