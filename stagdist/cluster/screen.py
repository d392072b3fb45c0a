"""What the supervisor shows people, written beside its work: a terminal that is held, a reader that sleeps or a full
disk behind the output must not keep it from telling the ranks that it is there."""

import os
import queue
import threading

CAPACITY = 10_000
"""Lines that wait at most; later ones are left out, for files hold everything."""


class Screen:
    """A stream that never blocks and never fails.

    Args:
        descriptor: of the open file that a thread writes to.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._lines = queue.Queue[str | None](CAPACITY)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Show the text, soon; it is left out where too much waits already."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            return

    def flush(self) -> None:
        """For logging; text is under way already."""

    def close(self, timeout_s: float = 2.0) -> None:
        """Wait until everything is shown, `timeout_s` seconds at most."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (text := self._lines.get()) is not None:
            data = text.encode(errors="replace")
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # nobody reads, no space: the next line may have more luck
                continue
