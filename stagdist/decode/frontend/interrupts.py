"""Ctrl-C, SIGTERM and a launcher that is gone, heard while the main thread waits inside a collective."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

REPEAT_S = 0.5
"""A second Ctrl-C within this time is the first one, passed on once more by a launcher."""
POLL_S = 0.5
_DEEPSPEED = b"deepspeed.launcher.launch"
_LAUNCHERS = (_DEEPSPEED, b"torchrun", b"torch.distributed")


class Interrupts:
    """Hears the signals of rank 0 in a thread of its own: they call `stop` once it is set, before they end the process.

    Python runs signal handlers in the main thread only, and there not before a call into gloo has returned. A second
    Ctrl-C ends the process at once.

    DeepSpeed's command does not pass SIGTERM on to its ranks: that it is gone counts as SIGTERM.

    Attributes:
        code: exit code of the first signal (130, 143); None when there was none.
        stop: ends the work in order; None while there is none.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self.stop: Callable[[], None] | None = None
        self._heard_s = 0.0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _nothing)  # the interpreter writes to the pipe when a signal has any handler
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()
        if launchers := _launchers():
            threading.Thread(target=self._watch, args=(launchers,), daemon=True, name="launcher").start()

    def _listen(self, reader: int) -> None:
        while numbers := os.read(reader, 1):
            if numbers[0] in (signal.SIGINT, signal.SIGTERM):
                self._hear(numbers[0])

    def _watch(self, launchers: list[tuple[int, int]]) -> None:
        while all(_parent(child) == parent for child, parent in launchers):
            time.sleep(POLL_S)
        self._hear(signal.SIGTERM)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self.stop is None:
            os._exit(128 + number)
        if self.code is None:
            self.code, self._heard_s = 128 + number, now
            self.stop()
        elif number == signal.SIGINT and now - self._heard_s > REPEAT_S:
            os._exit(128 + number)


def leave_to_first_rank() -> None:
    """For the other ranks: a terminal sends Ctrl-C to all, and rank 0 ends them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _nothing(number: int, frame: object) -> None:
    """A handler that only makes the interpreter hear the signal."""


def _launchers() -> list[tuple[int, int]]:
    """(process, its parent) of this process and, below DeepSpeed's command, of its parent; none without launcher."""
    own, parent = os.getpid(), os.getppid()
    command = _command_line(parent)
    if not any(name in command for name in _LAUNCHERS):
        return []
    pairs = [(own, parent)]
    if _DEEPSPEED in command and (grandparent := _parent(parent)) is not None:
        pairs.append((parent, grandparent))
    return pairs


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # no /proc: nothing is watched, and signals still work
        return b""


def _parent(process: int) -> int | None:
    try:
        # The name of the command, in brackets, may hold anything.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
