"""Complete directories: `complete.json` records size and sha256 of every file, and is written last.

Checkpoints and model directories are written under a hidden name, get their record, and are then renamed. A killed
process leaves nothing that looks complete. Imports no torch.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagdist.errors import CheckpointError
from stagdist.files import FileRecord, file_record, not_downloaded, sync_path, writing

COMPLETE = "complete.json"
OTHER_CONTENT = "has other content than was written"
_BLOCK = 1 << 22


def checkpoint_files(directory: Path) -> list[str]:
    """Relative names of all files except `complete.json`, sorted."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != COMPLETE)


def write_complete(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Write `complete.json`, which makes the directory a checkpoint."""
    body = {"files": {name: asdict(record) for name, record in sorted(records.items())}}
    with writing(directory / COMPLETE, sync=True) as stream:
        json.dump(body, stream, indent=1)
    sync_path(directory)


def aside(final: Path) -> Path:
    """The hidden name of a directory while a new one takes its place."""
    return final.with_name(f".replaced-{final.name}")


def recover(final: Path) -> None:
    """Finish a replacement that a kill interrupted: restore the old directory, or remove it if the new one is there."""
    old = aside(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        old.rename(final)


def publish(staged: Path, final: Path) -> None:
    """Rename a finished directory to its final name, and remove the hidden folder that it was in.

    A directory that it replaces is kept aside until then: see `recover`.
    """
    recover(final)
    if final.exists():
        final.rename(aside(final))
    try:
        staged.rename(final)
    finally:
        recover(final)
    sync_path(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def refuse_undownloaded(path: Path) -> None:
    """Refuse a file that is a git-lfs pointer, a web page or empty.

    Raises:
        CheckpointError: it is one. A file that cannot be opened is left to its reader.
    """
    try:
        problem = not_downloaded(path)
    except OSError:
        return
    if problem is not None:
        raise CheckpointError(problem)


def read_complete(directory: Path) -> dict[str, FileRecord]:
    """The records of `complete.json`.

    Raises:
        CheckpointError: the directory is not a complete checkpoint.
    """
    try:
        refuse_undownloaded(directory / COMPLETE)
        body: dict[str, Any] = json.loads((directory / COMPLETE).read_text())
        records = {name: FileRecord(**record) for name, record in body["files"].items()}
        for name, record in records.items():
            if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
                raise ValueError(f"{name!r} is not a file of the directory")
            if type(record.size) is not int or not isinstance(record.sha256, str):
                raise TypeError(f"the record of {name} is no size and sha256")
        return records
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{directory} is not a complete checkpoint: {COMPLETE}: {reason}") from error


def damage(
    directory: Path, names: Iterable[str], records: Mapping[str, FileRecord], *, contents: bool = True
) -> str | None:
    """The first reason why the files `names` do not match their records; None if all match.

    Args:
        contents: compare the hashes too, not only the sizes.
    """
    for name in names:
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != records[name].size:
            return not_downloaded(path) or f"{name} has {path.stat().st_size} bytes, {records[name].size} were written"
        if contents and file_record(path).sha256 != records[name].sha256:
            return f"{name} {OTHER_CONTENT}"
    return None


class RunningHashes:
    """Hashes safetensors files while they are read, so that a checked conversion reads every byte once.

    A file is hashed as far as it was read; `damage` hashes the rest and compares.
    """

    def __init__(self, directory: Path, records: Mapping[str, FileRecord]):
        self._directory, self._records = directory, records
        self._positions = dict.fromkeys(records, 0)
        self._digests = {name: hashlib.sha256() for name in records}
        self._ends: dict[str, dict[str, int]] = {}

    def reading(self, name: str, tensor: str) -> None:
        """Hash a file up to the end of one of its tensors, which is about to be read."""
        if name in self._records:
            if name not in self._ends:
                self._ends[name] = _tensor_ends(self._directory / name)
            self._advance(name, self._ends[name].get(tensor, 0))

    def damage(self) -> str | None:
        """The first reason why a file does not match its record; None if all match."""
        for name, record in self._records.items():
            self._advance(name, record.size)
            if self._digests[name].hexdigest() != record.sha256:
                return f"{name} {OTHER_CONTENT}"
        return None

    def _advance(self, name: str, stop: int) -> None:
        if stop <= self._positions[name]:
            return
        with (self._directory / name).open("rb") as stream:  # not kept: a checkpoint may have thousands of files
            stream.seek(self._positions[name])
            while (missing := stop - stream.tell()) > 0 and (block := stream.read(min(missing, _BLOCK))):
                self._digests[name].update(block)
            self._positions[name] = stream.tell()


def _tensor_ends(path: Path) -> dict[str, int]:
    """Position after the last byte of every tensor of a safetensors file that the library accepts."""
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    return {name: 8 + header_bytes + entry["data_offsets"][1] for name, entry in header.items()}
