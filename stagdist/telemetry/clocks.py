"""Clocks for spans: one for the host, and one for the work of a GPU that does not wait for it."""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

ANCHOR_MS = 100.0
"""Longest time that is read from one event to another; float32 holds it to 8 nanoseconds."""

MAX_PENDING = 10_000
"""Events that wait to be read before `EventClock.mark` reads those that have completed."""


class Clock(Protocol):
    """Records a point in time now and converts it to nanoseconds later."""

    def mark(self) -> int:
        """Take the time; the result is meaningful to this clock only."""

    def nanoseconds(self, mark: int) -> int:
        """Time of a mark on the scale of `time.perf_counter_ns`."""


class HostClock:
    """The time at which the host gets there."""

    def mark(self) -> int:
        """Take the time."""
        return time.perf_counter_ns()

    def nanoseconds(self, mark: int) -> int:
        """Time of a mark on the scale of `time.perf_counter_ns`."""
        return mark


class EventClock:
    """The time at which the GPU gets there: a mark is an event in the current stream of the current device.

    Making the clock waits for the work of the current stream. After that nothing waits until `nanoseconds` is called,
    which waits for the newest event. A span that waited for the device at both ends would hang where the device waits
    for a peer.

    Args:
        new_event: makes an event, `torch.cuda.Event(enable_timing=True)` unless given.
    """

    def __init__(self, new_event: Callable[[], Any] | None = None) -> None:
        if new_event is None:
            import torch

            new_event = partial(torch.cuda.Event, enable_timing=True)
        self._new_event = new_event
        self._pending: deque[Any] = deque()
        self._times_ns: list[int] = []
        self._anchor = self._new_event()
        self._anchor.record()
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()

    def mark(self) -> int:
        """Record an event; the result counts the marks so far."""
        if len(self._pending) >= MAX_PENDING and self._pending[0].query():
            self._read_oldest()
        event = self._new_event()
        event.record()
        self._pending.append(event)
        return len(self._times_ns) + len(self._pending) - 1

    def nanoseconds(self, mark: int) -> int:
        """Time of a mark on the scale of `time.perf_counter_ns`."""
        if mark >= len(self._times_ns):
            self._pending[-1].synchronize()
            while self._pending:
                self._read_oldest()
        return self._times_ns[mark]

    def _read_oldest(self) -> None:
        event = self._pending.popleft()
        elapsed_ms = self._anchor.elapsed_time(event)
        time_ns = self._anchor_ns + round(1e6 * elapsed_ms)
        self._times_ns.append(time_ns)
        if elapsed_ms > ANCHOR_MS:
            self._anchor, self._anchor_ns = event, time_ns
