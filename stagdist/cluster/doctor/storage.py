"""The folder of the checkpoints, seen from one host: can it be written, how fast, and do all hosts see the same?"""

import contextlib
import os
import shutil
import time
from pathlib import Path

from stagdist.cluster.doctor.facts import Storage

BLOCK_BYTES = 4 << 20
PATIENCE_S = 5.0
"""Seconds for a file written elsewhere to appear: network file systems remember directories for a while."""


def scratch(folder: Path, token: str) -> Path:
    """Where one examination keeps its files."""
    return folder / f".stagdist-doctor-{token}"


def write(folder: Path, token: str, name: str, content: str, size_mib: int) -> Storage:
    """Leave a file for the other hosts, and measure how fast a larger one reaches the disk."""
    created: list[str] = []
    try:
        for missing in [path for path in [*reversed(folder.parents), folder] if not path.exists()]:
            with contextlib.suppress(FileExistsError):  # another host was faster
                missing.mkdir()
                created.append(str(missing))
        own = scratch(folder, token)
        own.mkdir(exist_ok=True)
        speed = _write_speed(own / f"{name}.data", size_mib)
        (own / name).write_text(content)
        status = os.statvfs(folder)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or folder}"
        return Storage(str(folder), reason, created=tuple(created))
    total, free = (blocks * status.f_frsize >> 20 for blocks in (status.f_blocks, status.f_bavail))
    return Storage(str(folder), "", _kind(folder), total, free, speed, tuple(created))


def _write_speed(path: Path, size_mib: int) -> float:
    """10^6 bytes per second, until they are safe on the disk."""
    block = os.urandom(BLOCK_BYTES)  # nothing that a file system could compress
    blocks = max(1, size_mib * 2**20 // BLOCK_BYTES)
    started = time.monotonic()
    try:
        with path.open("wb", buffering=0) as stream:
            for _ in range(blocks):
                stream.write(block)
            os.fsync(stream.fileno())
        return blocks * BLOCK_BYTES / (time.monotonic() - started) / 1e6
    finally:
        path.unlink(missing_ok=True)


def _kind(folder: Path) -> str:
    """Type of the file system that the folder lies on."""
    found, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, name, *_ = line.split()
        place = place.encode().decode("unicode_escape")
        if len(place) >= len(found) and folder.resolve().is_relative_to(place):
            found, kind = place, name
    return kind


def read(folder: Path, token: str, names: list[str], patience_s: float = PATIENCE_S) -> dict[str, str | None]:
    """What the files of all hosts hold here; None where one cannot be read."""
    deadline = time.monotonic() + patience_s
    found: dict[str, str | None] = dict.fromkeys(names)
    while True:
        for name in names:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found[name] = (scratch(folder, token) / name).read_text()
        if None not in found.values() or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def clean(folder: Path, token: str, created: list[str]) -> None:
    """Take away what the examination wrote, and the folders it made if nothing else came into them."""
    shutil.rmtree(scratch(folder, token), ignore_errors=True)
    for path in reversed(created):
        with contextlib.suppress(OSError):
            Path(path).rmdir()
