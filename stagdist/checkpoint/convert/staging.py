"""What all conversions share: options, a hidden place to write in, the proof by logits."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stagdist.checkpoint.convert.find import Found, WeightSource, find
from stagdist.checkpoint.convert.proof import largest_difference
from stagdist.checkpoint.convert.replacing import aside, nameless, recover, replaced
from stagdist.checkpoint.training.content import Track, untracked
from stagdist.errors import CheckpointError
from stagdist.files import sync_path


@dataclass(frozen=True)
class Options:
    """What conversions may be told.

    Attributes:
        tokenizer: where the tokenizer is, when the source does not say it.
        trust_pickle: see `load_file`.
        overwrite: replace what exists.
        files_checked: the files of a training checkpoint were just compared with their records.
        track: shows progress.
    """

    tokenizer: str | None = None
    trust_pickle: bool = False
    overwrite: bool = False
    files_checked: bool = False
    track: Track[Any] = untracked


@dataclass(frozen=True)
class Proof:
    """What a conversion has shown.

    Attributes:
        directory: what it wrote.
        checked: what was compared, for a person.
    """

    directory: Path
    checked: str


def prove_logits(source: WeightSource, written: WeightSource, input_ids: Tensor, track: Track[Any]) -> str:
    """Compare two models on the same tokens; returns what that proved, for a person. `track` shows progress.

    Raises:
        CheckpointError: a logit differs in a bit.
    """
    difference = largest_difference(source, written, input_ids, track)
    if difference != 0.0:
        raise CheckpointError(f"the logits on {input_ids.shape[1]} tokens of text differ by {difference:.3g}")
    return f", so are the logits on {input_ids.shape[1]} tokens of text"


def require_free(destination: Path, kind: str, options: Options) -> None:
    """Nothing is replaced unasked, and only by its like: never a run's folder with all that is in it.

    Args:
        kind: of what will be written, as in `Found`.

    Raises:
        CheckpointError: it exists, or cannot be made where it is to be.
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
    if found != Found(kind, destination):
        wanted = {"model": "model directory", "training": "training checkpoint"}[kind]
        raise CheckpointError(f"{destination} will not be overwritten: it is no {wanted}; choose another destination")


def require_makeable(destination: Path) -> None:
    """A folder can be made there.

    Raises:
        CheckpointError: it cannot, as far as can be told beforehand.
    """
    destination = destination.resolve()
    nearest = next(folder for folder in (*destination.parents, destination) if os.path.exists(folder))
    usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    if not usable or not destination.name:
        reason = "is no folder that can be written to" if destination.name else "is the root of the file system"
        raise CheckpointError(f"{destination} cannot be made: {nearest} {reason}; choose another destination")


@contextmanager
def exclusive(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, which goes afterwards; that of a killed process is free to take.

    Args:
        busy: what another process that holds it is doing.

    Raises:
        CheckpointError: another process holds it.
    """
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise CheckpointError(f"{busy}; wait for its end, or end it") from error
        except OSError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):  # its holder has removed it since it was opened
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def staged_folder(destination: Path, kind: str, options: Options) -> Iterator[Path]:
    """A folder of the destination's name inside a hidden one beside it; removed when the conversion fails, with all
    folders that were made for it. One conversion at a time writes a destination.

    Args:
        kind, options: see `require_free`.

    Raises:
        CheckpointError: the destination will not do, another conversion is writing it, or the disk is full.
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
            with suppress(OSError):  # it is not empty: the conversion is there
                folder.rmdir()


def _writing(final: Path, told: Path) -> AbstractContextManager[None]:
    """Nobody else writes a destination meanwhile; `told` is its name for a person."""
    return exclusive(final.parent / f".converting-{final.name}.lock", f"another conversion is writing {told}")


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
    """Give a finished folder its name. What it replaces lies beside it until that is done, see `recover`."""
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
    """Give every folder its name back whose replacement a kill cut short; returns those.

    What was left of an old one beside the new one goes, so that it cannot take its place one day.

    Raises:
        CheckpointError: a conversion is replacing one now.
    """
    found = nameless(folder.resolve())
    for final in found:
        with _writing(final, final):
            recover(final)
    for final in set(replaced(folder.resolve())) - set(found):
        with suppress(CheckpointError), _writing(final, final):
            recover(final)
    return found
