"""Complete directories: `complete.json` records size and sha256 of every file, and is written last.

Checkpoints and model directories are written under a hidden name, get their record, and are then renamed. A killed
process leaves nothing that looks complete. Imports no torch.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagdist.checkpoint.published.other_formats import refuse_undownloaded
from stagdist.errors import CheckpointError
from stagdist.files import FileRecord, file_record, not_downloaded, sync_path, writing

COMPLETE = "complete.json"


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


def publish(staged: Path, final: Path) -> None:
    """Rename a finished directory to its final name. An incomplete directory of that name is removed."""
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    sync_path(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def read_complete(directory: Path) -> dict[str, FileRecord]:
    """The records of `complete.json`.

    Raises:
        CheckpointError: the directory is not a complete checkpoint.
    """
    try:
        refuse_undownloaded(directory / COMPLETE)
        body: dict[str, Any] = json.loads((directory / COMPLETE).read_text())
        return {name: FileRecord(**record) for name, record in body["files"].items()}
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory} is not a complete checkpoint: {COMPLETE}: {error}") from error


def damage(directory: Path, names: Iterable[str], records: Mapping[str, FileRecord]) -> str | None:
    """The first reason why the files `names` do not match their records; None if all match."""
    for name in names:
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != records[name].size:
            return not_downloaded(path) or f"{name} has {path.stat().st_size} bytes, {records[name].size} were written"
        if file_record(path).sha256 != records[name].sha256:
            return f"{name} has other content than was written"
    return None
