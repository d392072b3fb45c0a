"""`run.json`: what happened to a supervised run, event by event."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class History:
    """Keeps events in memory and in the file, which is always whole. A run that starts again goes on with its file.

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

    def note(self, event: str, **facts: Any) -> None:
        """Add an event; the time is that of this host's clock, seconds since 1970."""
        self._body["events"].append({"event": event, "time": time.time(), **facts})
        part = self._path.with_name(self._path.name + ".part")
        try:
            with part.open("w") as stream:
                json.dump(self._body, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            part.rename(self._path)
        except OSError:
            # A full disk must not end the supervision; the next event tries again with everything.
            part.unlink(missing_ok=True)
