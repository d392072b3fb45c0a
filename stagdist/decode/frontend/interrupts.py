"""Ctrl-C, SIGTERM and the death of a launcher, handled while the main thread waits inside a collective."""

import os
import signal
import threading
import time
from collections.abc import Callable

import psutil

REPEAT_S = 0.5
"""A second signal within this time is the first one, forwarded by a launcher."""
POLL_S = 0.5
_DEEPSPEED = "deepspeed.launcher.launch"
_LAUNCHERS = (_DEEPSPEED, "torchrun", "torch.distributed")


class Interrupts:
    """Receives the signals of rank 0 in a thread of its own.

    Python runs signal handlers in the main thread only, and there not before a call into gloo has returned. Before
    `stop_with`, a signal ends the process. A second Ctrl-C, or a second SIGTERM after a first, ends it at once.

    DeepSpeed's command does not forward SIGTERM to its ranks, so its death counts as a first SIGTERM.

    Attributes:
        code: exit code of the first signal (130, 143); None when there was none.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._stop: Callable[[], None] | None = None
        self._received_s = 0.0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # the interpreter writes to the pipe if a signal has any handler
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._read_signals, args=(reader,), daemon=True, name="signals").start()
        if launchers := _launchers():
            threading.Thread(target=self._watch, args=(launchers,), daemon=True, name="launcher").start()

    def stop_with(self, stop: Callable[[], None]) -> None:
        """From now on the first signal calls `stop`, which shuts down cleanly."""
        self._stop = stop

    def _read_signals(self, reader: int) -> None:
        while numbers := os.read(reader, 1):
            if numbers[0] in (signal.SIGINT, signal.SIGTERM):
                self._handle(numbers[0])

    def _watch(self, launchers: list[tuple[psutil.Process, int]]) -> None:
        while all(_has_parent(child, parent) for child, parent in launchers):
            time.sleep(POLL_S)
        if self.code is None:
            self._handle(signal.SIGTERM)

    def _handle(self, number: int) -> None:
        now = time.monotonic()
        if self._stop is None:
            os._exit(128 + number)
        if self.code is None:
            self.code, self._received_s = 128 + number, now
            self._stop()
        elif number in (signal.SIGINT, self.code - 128) and now - self._received_s > REPEAT_S:
            os._exit(128 + number)


def _launchers() -> list[tuple[psutil.Process, int]]:
    """Process and parent: this process and, below DeepSpeed's command, its parent. Empty without a launcher."""
    own = psutil.Process()
    try:
        parent = psutil.Process(own.ppid())
        command = " ".join(parent.cmdline())
        if not any(name in command for name in _LAUNCHERS):
            return []
        pairs = [(own, parent.pid)]
        return pairs + [(parent, parent.ppid())] if _DEEPSPEED in command else pairs
    except psutil.Error:  # nothing is watched, and signals still work
        return []


def _has_parent(process: psutil.Process, parent: int) -> bool:
    try:
        return process.ppid() == parent
    except psutil.Error:
        return False
