"""What all conversions share: options, results, and a hidden folder that is published when the result is proved.

`checkpoint.complete.publish` makes a conversion visible: everything else writes plainly into the folder it is given.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagdist.checkpoint.complete import recover
from stagdist.checkpoint.convert.find import FoundCheckpoint, find
from stagdist.checkpoint.weight_source import Track, untracked
from stagdist.errors import CheckpointError
from stagdist.files import locked


@dataclass(frozen=True)
class ConversionOptions:
    """Options of all conversions.

    Attributes:
        tokenizer: path of the tokenizer; None for the tokenizer of the source.
        overwrite: replace an existing model directory.
        track: shows progress.
    """

    tokenizer: str | None = None
    overwrite: bool = False
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


def require_free(destination: Path, options: ConversionOptions) -> None:
    """Refuse a destination that cannot be created, or that exists and is no model directory to overwrite.

    Raises:
        CheckpointError: it is refused.
    """
    destination = destination.resolve()
    nearest = next(folder for folder in (*destination.parents, destination) if os.path.exists(folder))
    if not destination.name or not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        reason = "is no folder that can be written to" if destination.name else "is the root of the file system"
        raise CheckpointError(f"{destination} cannot be made: {nearest} {reason}; choose another destination")
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
    if found != FoundCheckpoint("model", destination):
        raise CheckpointError(
            f"{destination} will not be overwritten: it is no model directory; choose another destination"
        )


@contextmanager
def staged_folder(destination: Path, options: ConversionOptions) -> Iterator[Path]:
    """Yield an empty folder with the destination's name inside a hidden folder beside the destination.

    The hidden folder is removed at the end, and so are parent folders that were created for a conversion that failed.
    Only one conversion at a time can write a destination.

    Raises:
        CheckpointError: the destination is refused, another conversion is writing it, or the disk failed or is full.
    """
    final = destination.resolve()
    require_free(final, options)
    hidden = final.parent / f".converting-{final.name}"
    made = [folder for folder in hidden.parents if not folder.exists()]
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        with locked(hidden / "lock"):
            try:
                recover(final)
                require_free(final, options)
                shutil.rmtree(hidden / final.name, ignore_errors=True)
                (hidden / final.name).mkdir()
                yield hidden / final.name
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
    except TimeoutError as error:
        raise CheckpointError(f"another conversion is writing {destination}; wait until it ends, or stop it") from error
    except OSError as error:
        free = shutil.disk_usage(next(folder for folder in hidden.parents if folder.exists())).free
        full = f", {free / 1e9:.1f} GB were left; free space, or choose a destination on another disk"
        raise CheckpointError(
            f"{destination} could not be written: {error}{full if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}"
        ) from error
    finally:
        for folder in made:
            with suppress(OSError):  # not empty: the conversion succeeded
                folder.rmdir()
