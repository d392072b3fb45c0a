"""`run.json`: the events of a supervised run."""

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagdist.files import writing


class EventLog:
    """Keeps events in memory and in a file that is replaced as a unit. A restarted supervisor appends to the same file.

    A thread writes the file, so that a disk that does not answer cannot block the supervisor.

    Args:
        path: the file.
        command: script and arguments of the run.
    """

    def __init__(self, path: Path, command: Sequence[str]):
        self._path = path
        try:
            earlier = json.loads(path.read_text())["events"]
        except (OSError, ValueError, KeyError, TypeError):
            earlier = []
        events = earlier if isinstance(earlier, list) else []
        self._body: dict[str, Any] = {"command": list(command), "events": events}
        self._changed = threading.Condition()
        self._text: str | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def note(self, event: str, **facts: Any) -> None:
        """Add an event with the time of this host, in seconds since 1970."""
        self._body["events"].append({"event": event, "time": time.time(), **facts})
        with self._changed:
            self._text = json.dumps(self._body, indent=1)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="event log", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait until all events are in the file, at most `timeout_s` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._text is not None or self._closed)
                text, self._text = self._text, None
            if text is None:
                return
            # A full disk must not end the supervision. The next event writes everything again.
            with contextlib.suppress(OSError), writing(self._path, sync=True) as stream:
                stream.write(text)
