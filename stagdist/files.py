"""Files written at once or not at all, hashes of files, locks between processes, and what failed downloads leave."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock

PARTIAL = ".partial"
"""Suffix of a file that is still being written."""

_BLOCK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


def not_downloaded(path: str | Path, *, text: bool = False) -> str | None:
    """The problem of a file that is not there although its name is, with the remedy; None if it looks like the file.

    Args:
        text: the file is text of any kind, which may be empty or HTML.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return f"{path} is a git-lfs pointer, not the file: run git lfs pull in its directory"
    if not head and not text:
        return f"{path} is empty (0 bytes), its download or copy did not finish; get it again"
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype html", b"<html")) and not text:
        return f"{path} begins with <!DOCTYPE html: it is a web page, not the file; log in if needed, get it again"
    return None


def file_record(path: Path, *, sync: bool = False) -> FileRecord:
    """Measure a file. `sync` also waits until it has reached the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(stream.fileno())
    return FileRecord(size, digest.hexdigest())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to. The file takes the name `path` when the block ends without an error.

    A reader never sees half a file. An error removes the partial file and leaves the old one.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path, mode: str = "w", *, sync: bool = False, private: bool = False) -> Iterator[IO]:
    """Open a file that replaces `path` when the block ends without an error.

    Args:
        mode: `w` (UTF-8 text) or `wb`.
        sync: wait until the contents have reached the disk before the file takes its name.
        private: only the owner can read or write the file.
    """
    with replacing(path) as partial:
        partial.unlink(missing_ok=True)  # a private file must not inherit the permissions of a leftover
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())


def sync_path(path: Path) -> None:
    """Wait until a file, or the entries of a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file between processes. The lock of a killed process is free; the empty file stays.

    Args:
        timeout_s: how long to wait for another process; -1 waits without a limit.

    Raises:
        TimeoutError: another process holds the lock.
        OSError: the file cannot be made, or its file system has no locks.
    """
    try:
        with filelock.FileLock(path, timeout=timeout_s, mode=0o666):
            yield
    except filelock.Timeout:
        raise TimeoutError(f"{path} is held by another process") from None
    except NotImplementedError as error:
        raise OSError(f"the file system of {path} has no locks") from error
