"""Write a rank's file of a checkpoint in a background thread.

A thread is enough: the slow parts (sha256, copying into the file, waiting for the disk) release Python's global
interpreter lock. And a thread ends with its rank, however that ends.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from stagdist.checkpoint.training.writer import OwnedFragment, write_fragments
from stagdist.files import FileRecord
from stagdist.telemetry.logging import ONLY_IN_FILE

LOG = logging.getLogger(__name__)


class BackgroundWrite:
    """One rank's file of one save.

    Args:
        fragments: their values must not change until the file is written; no file is written for none.
    """

    def __init__(self, path: Path, fragments: Sequence[OwnedFragment]):
        self._path, self._fragments = path, fragments
        self._record: FileRecord | None = None
        self._failure: str | None = None
        self._given_up = threading.Event()
        # A daemon thread: a rank that must exit at once does not wait for a slow disk.
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the file is still being written."""
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the file could not be written."""
        return self._failure is not None

    def check(self) -> None:
        """Raise a failure, if any, without waiting.

        Raises:
            OSError: the file could not be written, or the writer broke.
        """
        if self._failure is not None:
            raise OSError(self._failure)

    def give_up(self, timeout_s: float) -> None:
        """Abandon the write. Returns after `timeout_s` at the latest, also if the disk does not respond."""
        self._given_up.set()
        self._thread.join(timeout_s)

    def record(self) -> FileRecord | None:
        """Wait until the file is written; return its size and hash, or None if there are no fragments.

        Raises:
            OSError: it could not be written, or the writer broke.
        """
        self._thread.join()
        self.check()
        return self._record

    def _run(self) -> None:
        if not self._fragments:
            return
        try:
            self._record = write_fragments(self._path, self._fragments, self._given_up)
        except OSError as error:
            self._failure = str(error)
        except Exception as error:  # otherwise a broken thread would look like a finished one
            LOG.error("the writer of %s broke", self._path, exc_info=True, extra=ONLY_IN_FILE)
            self._failure = f"the writer of {self._path} broke: {type(error).__name__}: {error}"
