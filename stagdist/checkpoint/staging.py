"""What all conversions share: options, a hidden place to write in, the proof by logits."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stagdist.checkpoint.proof import largest_difference
from stagdist.checkpoint.sources import Found, WeightSource, find
from stagdist.checkpoint.training_source import Track, untracked
from stagdist.errors import CheckpointError


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


def prove_logits(source: WeightSource, written: WeightSource, input_ids: Tensor) -> str:
    """Compare two models on the same tokens; returns what that proved, for a person.

    Raises:
        CheckpointError: a logit differs in a bit.
    """
    difference = largest_difference(source, written, input_ids)
    if difference != 0.0:
        raise CheckpointError(f"the logits on {input_ids.shape[1]} tokens of text differ by {difference:.3g}")
    return f", so are the logits on {input_ids.shape[1]} tokens of text"


def require_free(destination: Path, kind: str, options: Options) -> None:
    """Nothing is replaced unasked, and only by its like: never a run's folder with all that is in it.

    Args:
        kind: of what will be written, as in `Found`.

    Raises:
        CheckpointError: it exists.
    """
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


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder of the final name inside a hidden one beside it; removed when the conversion fails, with all folders
    that were made for it.

    Raises:
        CheckpointError: the disk is full.
    """
    hidden = final.parent / f".converting-{final.name}"
    made = [folder for folder in hidden.parents if not folder.exists()]
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        (hidden / final.name).mkdir(parents=True)
        yield hidden / final.name
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(hidden).free
        raise CheckpointError(
            f"{final} could not be written: {error.strerror}, {free / 1e9:.1f} GB were left; free space, or choose a "
            "destination on another disk"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # it is not empty: the conversion is there
                folder.rmdir()
