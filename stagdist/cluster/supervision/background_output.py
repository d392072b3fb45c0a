"""Output written beside the work: a terminal that is held, a reader that sleeps, a disk that is full or does not answer
must not keep the supervisor from telling the ranks that it is there, nor an agent from telling how its rank is."""

import os
import queue
import threading

CAPACITY = 1000
"""Pieces that wait at most; later ones are left out, and what follows says so."""


class Screen:
    """A stream that never blocks and never fails.

    Args:
        descriptor: of the open file that a thread writes to.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._pieces = queue.Queue[bytes | None](CAPACITY)
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Show the text, soon; it is left out where too much waits already."""
        self.put(text.encode(errors="replace"))

    def put(self, data: bytes) -> None:
        """The same with bytes."""
        note = f"[{self._left_out} pieces of output were left out: too much was waiting]\n" if self._left_out else ""
        try:
            self._pieces.put_nowait(note.encode() + data)
            self._left_out = 0
        except queue.Full:
            self._left_out += 1

    def flush(self) -> None:
        """For logging; text is under way already."""

    def close(self, timeout_s: float = 2.0) -> None:
        """Wait until everything is shown, `timeout_s` seconds at most."""
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
            except OSError:  # nobody reads, no space: the next line may have more luck
                continue
