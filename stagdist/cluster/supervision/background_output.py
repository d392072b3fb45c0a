"""Writes console and log output from a background thread.

A blocked terminal or a full disk must not delay heartbeats, so output is queued, and dropped with a note when the queue
is full.
"""

import os
import queue
import threading

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
