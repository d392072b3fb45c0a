"""Writes console and log output from a background thread.

A blocked terminal or a full disk must not delay heartbeats, so output is queued, and dropped with a note when the queue
is full.
"""

import os
import queue
import threading
from collections import deque
from typing import IO

from stagdist.cluster.supervision.messages import LONGEST_LINE

TAIL_LINES = 60
"""Lines of output that an agent keeps for an error report."""

LONGEST_SHOWN = 400
"""Characters of a line that are sent to the supervisor. The log file holds the complete line."""

DRAIN_S = 2.0
"""Seconds to wait for remaining output after the script has ended. A process that it left may hold the pipe open."""

CAPACITY = 1000
"""Pieces of output that can be queued. Later ones are dropped, and a note says how many."""


class BackgroundWriter:
    """A text stream whose writes never block and never fail.

    Args:
        descriptor: of the open file that the thread writes to.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._pieces = queue.Queue[bytes | None](CAPACITY)
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Queue text, or drop it when the queue is full."""
        self.put(text.encode(errors="replace"))

    def put(self, data: bytes) -> None:
        """Queue bytes, or drop them when the queue is full."""
        note = f"[{self._left_out} pieces of output were left out: too much was waiting]\n" if self._left_out else ""
        try:
            self._pieces.put_nowait(note.encode() + data)
            self._left_out = 0
        except queue.Full:
            self._left_out += 1

    def flush(self) -> None:
        """Do nothing; `logging` calls this after every record."""

    def close(self, timeout_s: float = 2.0) -> None:
        """Wait until everything is written, at most `timeout_s` seconds."""
        try:
            self._pieces.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (data := self._pieces.get()) is not None:
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # no reader or no space; a later piece may succeed
                continue


class ScriptOutput:
    """The output of a script: everything in a file, the latest lines in memory.

    A full or slow disk does not block the agent.

    Args:
        stream: output of the script.
        file: log file, open for appending.

    Attributes:
        tail: latest lines.
        ended: the stream has ended.
    """

    def __init__(self, stream: IO[bytes], file: IO[bytes]):
        self.stream, self.tail = stream, deque[str](maxlen=TAIL_LINES)
        os.set_blocking(stream.fileno(), False)
        self._rest, self.ended = b"", False
        self._file, self._kept = file, BackgroundWriter(file.fileno())

    def read(self) -> list[str]:
        """New complete lines, shortened."""
        try:
            data = os.read(self.stream.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return []
        self._kept.put(data)
        self.ended = not data
        *lines, self._rest = (self._rest + (b"\n" if self.ended and self._rest else data)).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        # A progress bar overwrites its line; only its last state counts.
        shown = [line.rpartition(b"\r")[2].decode(errors="replace")[:LONGEST_SHOWN] for line in lines]
        self.tail.extend(line for line in shown if line.strip())
        return shown

    def close(self) -> None:
        """Wait up to DRAIN_S until everything is in the file."""
        self._kept.close(DRAIN_S)
