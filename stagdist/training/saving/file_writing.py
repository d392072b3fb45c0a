"""Write the files of a checkpoint and hash them while they are written, directly or in a background thread.

A thread is enough: the slow parts (copying into the file, sha256, crc32, waiting for the disk) release Python's global
interpreter lock. And a thread ends with its rank, however that ends.
"""

import hashlib
import io
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stagdist.files import FileRecord
from stagdist.telemetry.logging import ONLY_IN_FILE

LOG = logging.getLogger(__name__)

_BLOCK = 1 << 22
"""Bytes between two checks whether the write was abandoned."""


class HashedFile(io.FileIO):
    """A new file for `torch.save` that computes size and sha256 while it is written.

    Args:
        given_up: makes the write fail with an OSError once it is set.
    """

    def __init__(self, path: Path, given_up: threading.Event):
        super().__init__(path, "wb")
        self._given_up = given_up
        self._digest, self._size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append all of `data`. The first failure is kept, because torch replaces it with an error of its own.

        Raises:
            OSError: the disk failed, or the write was abandoned.
        """
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _BLOCK):
                self._append(view[start : start + _BLOCK])
        except OSError as error:
            self.error = self.error or error
            raise
        return len(view)

    def _append(self, block: memoryview) -> None:
        if self._given_up.is_set():
            raise OSError("the write was abandoned")
        self._digest.update(block)
        self._size += len(block)
        while block:
            block = block[super().write(block) :]

    def record(self) -> FileRecord:
        """Size and hash of what was written so far."""
        return FileRecord(self._size, self._digest.hexdigest())


def write_file(content: object, path: Path, given_up: threading.Event) -> FileRecord:
    """Write the content of one file, and wait until it has reached the disk.

    Raises:
        OSError: it could not be written, or was abandoned; the message has the free space.
    """
    try:
        with HashedFile(path, given_up) as stream:
            try:
                torch.save(content, stream)
                os.fsync(stream.fileno())
            except (OSError, RuntimeError) as error:
                raise stream.error or error from None
    except (OSError, RuntimeError) as error:
        free_gb = shutil.disk_usage(path.parent).free / 1e9 if path.parent.exists() else 0.0
        says = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        raise OSError(f"{path} could not be written, {free_gb:.1f} GB are free: {says}") from error
    return stream.record()


class BackgroundWrite:
    """One rank's files of one save, written one after the other by a thread.

    Args:
        files: path and content; the contents must not change until all are written.
    """

    def __init__(self, files: Sequence[tuple[Path, object]]):
        self._files = files
        self._records: dict[Path, FileRecord] = {}
        self._failure: str | None = None
        self._given_up = threading.Event()
        # A daemon thread: a rank that must exit at once does not wait for a slow disk.
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether files are still being written."""
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a file could not be written."""
        return self._failure is not None

    def check(self) -> None:
        """Raise a failure, if any, without waiting.

        Raises:
            OSError: a file could not be written, or the writer broke.
        """
        if self._failure is not None:
            raise OSError(self._failure)

    def give_up(self, timeout_s: float) -> None:
        """Abandon the write. Returns after `timeout_s` at the latest, also if the disk does not respond."""
        self._given_up.set()
        self._thread.join(timeout_s)

    def records(self) -> dict[Path, FileRecord]:
        """Wait until all files are written; return size and hash of every file.

        Raises:
            OSError: a file could not be written, or the writer broke.
        """
        self._thread.join()
        self.check()
        return self._records

    def _run(self) -> None:
        for path, content in self._files:
            try:
                self._records[path] = write_file(content, path, self._given_up)
            except OSError as error:
                self._failure = str(error)
                return
            except Exception as error:  # otherwise a broken thread would look like a finished one
                LOG.error("the writer of %s broke", path, exc_info=True, extra=ONLY_IN_FILE)
                self._failure = f"the writer of {path} broke: {type(error).__name__}: {error}"
                return
