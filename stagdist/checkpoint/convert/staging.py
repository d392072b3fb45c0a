"""What all conversions share: options, results, and a hidden folder that is renamed when the result is proved.

This is the only place where a conversion becomes visible: everything else writes plainly into the folder it is given.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagdist.checkpoint.convert.find import FoundCheckpoint, find
from stagdist.checkpoint.convert.replaced import aside, nameless, recover, replaced
from stagdist.checkpoint.weight_source import Track, untracked
from stagdist.errors import CheckpointError
from stagdist.files import locked, sync_path


@dataclass(frozen=True)
class ConversionOptions:
    """Options of all conversions.

    Attributes:
        tokenizer: path of the tokenizer; None for the tokenizer of the source.
        overwrite: replace an existing destination.
        files_checked: the files of the source were just compared with their records.
        track: shows progress.
    """

    tokenizer: str | None = None
    overwrite: bool = False
    files_checked: bool = False
    track: Track[Any] = untracked


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion wrote and proved.

    Attributes:
        directory: what was written.
        checked: what was compared, as text for the user.
    """

    directory: Path
    checked: str


def require_free(destination: Path, kind: str, options: ConversionOptions) -> None:
    """Refuse a destination that exists, unless `overwrite` is set and the same kind of directory is replaced.

    Args:
        kind: what will be written, as in `FoundCheckpoint`.

    Raises:
        CheckpointError: the destination exists or cannot be created.
    """
    destination = destination.resolve()
    require_makeable(destination)
    if Path.cwd().is_relative_to(destination):
        raise CheckpointError(f"{destination} is or holds the current folder; choose another destination")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not options.overwrite:
        raise CheckpointError(f"{destination} exists; choose another destination, or --overwrite to replace it")
    try:
        found = find(destination)
    except CheckpointError as error:
        raise CheckpointError(f"{destination} will not be overwritten: {error}") from error
    if found != FoundCheckpoint(kind, destination):
        wanted = {"model": "model directory", "training": "training checkpoint"}[kind]
        raise CheckpointError(f"{destination} will not be overwritten: it is no {wanted}; choose another destination")


def require_makeable(destination: Path) -> None:
    """Check early that the destination can be created.

    Raises:
        CheckpointError: it cannot.
    """
    destination = destination.resolve()
    nearest = next(folder for folder in (*destination.parents, destination) if os.path.exists(folder))
    usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    if not usable or not destination.name:
        reason = "is no folder that can be written to" if destination.name else "is the root of the file system"
        raise CheckpointError(f"{destination} cannot be made: {nearest} {reason}; choose another destination")


@contextmanager
def exclusive(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file and remove it afterwards. The lock of a killed process is free.

    Args:
        busy: what the process that holds the lock is doing, for the error message.

    Raises:
        CheckpointError: another process holds the lock.
    """
    try:
        with locked(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # while it is held: a waiting process notices that its file is gone
    except TimeoutError as error:
        raise CheckpointError(f"{busy}; wait until it ends, or stop it") from error


@contextmanager
def staged_folder(destination: Path, kind: str, options: ConversionOptions) -> Iterator[Path]:
    """Yield an empty folder with the destination's name inside a hidden folder beside the destination.

    The hidden folder is removed at the end, and so are parent folders that were created for a conversion that failed.
    Only one conversion at a time can write a destination.

    Args:
        kind, options: see `require_free`.

    Raises:
        CheckpointError: the destination is refused, another conversion is writing it, or the disk is full.
    """
    final = destination.resolve()
    require_makeable(final)
    hidden = final.parent / f".converting-{final.name}"
    made = [folder for folder in hidden.parents if not folder.exists()]
    try:
        _make(final.parent, destination)
        with _writing(final, destination):
            recover(final)
            require_free(final, kind, options)
            shutil.rmtree(hidden, ignore_errors=True)
            try:
                _make(hidden / final.name, destination)
                yield hidden / final.name
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(next(folder for folder in hidden.parents if folder.exists())).free
        raise CheckpointError(
            f"{destination} could not be written: {error.strerror}, {free / 1e9:.1f} GB were left; free space, or "
            "choose a destination on another disk"
        ) from error
    finally:
        for folder in made:
            with suppress(OSError):  # not empty: the conversion succeeded
                folder.rmdir()


def _writing(final: Path, shown: Path) -> AbstractContextManager[None]:
    """Hold the lock of a destination; `shown` is its name in messages."""
    return exclusive(final.parent / f".converting-{final.name}.lock", f"another conversion is writing {shown}")


def _make(folder: Path, destination: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{destination} cannot be made: {error.filename}: {error.strerror}; choose another destination"
        ) from error


def put_in_place(staged: Path, final: Path) -> None:
    """Rename a finished folder to its final name. A folder that it replaces is kept aside until then: see `recover`."""
    old = aside(final)
    if final.exists():
        final.rename(old)
    try:
        staged.rename(final)
    except OSError:
        recover(final)
        raise
    sync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> list[Path]:
    """Restore every folder in `folder` whose replacement was interrupted; returns the restored ones.

    Remains of an old folder beside its replacement are removed, so that they can never take its place.

    Raises:
        CheckpointError: a conversion is replacing one of them now.
    """
    found = nameless(folder.resolve())
    for final in found:
        with _writing(final, final):
            recover(final)
    for final in set(replaced(folder.resolve())) - set(found):
        with suppress(CheckpointError), _writing(final, final):
            recover(final)
    return found
