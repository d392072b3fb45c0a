"""`run.json`: what happened to a supervised run, event by event."""

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class History:
    """Keeps events in memory and in the file, which is always whole. A run that starts again goes on with its file.

    A thread writes the file: a disk that does not answer must not keep the supervisor from its ranks.

    Args:
        path: the file.
        command: what is supervised.
    """

    def __init__(self, path: Path, command: Sequence[str]):
        self._path = path
        self._body: dict[str, Any] = {"command": list(command), "events": []}
        try:
            earlier = json.loads(path.read_text())["events"]
        except (OSError, ValueError, KeyError, TypeError):
            earlier = []
        self._body["events"] = earlier if isinstance(earlier, list) else []
        self._changed = threading.Condition()
        self._text: str | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def note(self, event: str, **facts: Any) -> None:
        """Add an event; the time is that of this host's clock, seconds since 1970."""
        self._body["events"].append({"event": event, "time": time.time(), **facts})
        with self._changed:
            self._text = json.dumps(self._body, indent=1)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="history", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait until everything is in the file, `timeout_s` seconds at most."""
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
            self._write(text)

    def _write(self, text: str) -> None:
        part = self._path.with_name(self._path.name + ".part")
        try:
            with part.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            part.rename(self._path)
        except OSError:
            # A full disk must not end the supervision; the next event tries again with everything.
            part.unlink(missing_ok=True)
