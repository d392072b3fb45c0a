"""Find and open the source of a conversion: a run, a training checkpoint or a model directory."""

import logging
from dataclasses import dataclass
from pathlib import Path

from stagdist.checkpoint.complete import COMPLETE, aside
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.other_formats import weights_there
from stagdist.checkpoint.training.directory import STATE, candidates, checkpoint_damage
from stagdist.checkpoint.training.index import INDEX
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.checkpoint.weight_source import WeightSource
from stagdist.data.compatibility import check_vocabulary
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import CheckpointError, ConfigError, DataError, OtherReleaseError

LOG = logging.getLogger(__name__)


class NoTokenizerError(CheckpointError):
    """The tokenizer of a source cannot be loaded."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """What a path refers to.

    Attributes:
        kind: `training` or `model`.
        directory: the checkpoint or model directory.
    """

    kind: str
    directory: Path


def find(path: str | Path) -> FoundCheckpoint:
    """Find what a path refers to: the folder of a run (or its `checkpoints`) means its newest complete checkpoint.

    Checkpoints that lack a file or a part of one are skipped with a warning. If there are only such, the newest one
    with a `complete.json` is returned, and opening it reports the damage.

    Raises:
        CheckpointError: there is neither a checkpoint nor a model directory, or a killed conversion left it under its
            hidden name.
    """
    folder = Path(path)
    if not folder.is_dir():
        if aside(folder).is_dir():
            raise CheckpointError(
                f"{folder} is in {aside(folder).name} because a conversion that was replacing it was killed; start "
                "that conversion again, or rename the folder"
            )
        raise CheckpointError(f"{folder} is no directory; give a run's folder, a checkpoint or a model directory")
    if (folder / STATE).is_file() or (folder / INDEX).is_file():
        return FoundCheckpoint("training", folder)
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if found := candidates(checkpoints):
        claiming = [checkpoint for checkpoint in found if (checkpoint / COMPLETE).is_file()]
        if not claiming:
            raise CheckpointError(f"none of the {len(found)} checkpoints in {checkpoints} is complete")
        return FoundCheckpoint("training", _first_complete(claiming) or claiming[0])
    if (folder / "config.json").is_file() or (folder / COMPLETE).is_file():
        return FoundCheckpoint("model", folder)
    there = f": {weights}" if (weights := weights_there(folder)) else ""
    raise CheckpointError(f"{folder} holds neither checkpoints nor a model directory (there is no config.json){there}")


def _first_complete(checkpoints: list[Path]) -> Path | None:
    for index, checkpoint in enumerate(checkpoints):
        try:
            reason = checkpoint_damage(checkpoint, contents=False)
        except (ConfigError, OtherReleaseError):  # not damage: opening it reports the key or the version
            return checkpoint
        if reason is None:
            return checkpoint
        if index + 1 < len(checkpoints):
            LOG.warning("skipping %s: %s", checkpoint, reason)
    return None


def open_weights(path: str | Path) -> WeightSource:
    """Open a training checkpoint or a model directory.

    All but the contents of the weights is checked now. They are hashed while they are read, for `check`.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the file or tensor.
    """
    found = find(path)
    if found.kind == "model":
        return ModelReader(found.directory, hashing=True)
    if reason := checkpoint_damage(found.directory, contents=False):
        raise CheckpointError(f"{found.directory}: {reason}; use an earlier checkpoint")
    return TrainingReader(found.directory, hashing=True)


def open_training(path: str | Path) -> TrainingReader:
    """`open_weights` of a training checkpoint; anything else is refused."""
    source = open_weights(path)
    if not isinstance(source, TrainingReader):
        raise CheckpointError(f"{source.directory} is a model directory; a run's folder or checkpoint is needed here")
    return source


def open_model(path: str | Path) -> ModelReader:
    """`open_weights` of a model directory; anything else is refused."""
    source = open_weights(path)
    if not isinstance(source, ModelReader):
        raise CheckpointError(f"{source.directory} is a training checkpoint; a model directory is needed here")
    return source


def source_tokenizer(source: WeightSource, given: str | None) -> Tokenizer:
    """Load the tokenizer of a source: the given one, else that of the model directory or of the configuration.

    It puts no special tokens before a text if the documents of the training had none.

    Raises:
        NoTokenizerError: there is none.
        CheckpointError: it is not the one of the training.
        DataError: it gives text ids that the model lacks.
    """
    if not isinstance(source, TrainingReader):
        return _loaded(source, given or str(source.directory))
    place = given or source.config.data.tokenizer
    tokenizer = _loaded(source, place)
    now, before = tokenizer.fingerprint, source.state.tokenizer
    if given is None and before not in ("", now):
        raise CheckpointError(
            f"{source.directory} was trained with another tokenizer than {place} holds now: its sha256 was "
            f"{before[:12]}, is {now[:12]}; restore it, or name one with --tokenizer"
        )
    return tokenizer if source.state.documents_begin else tokenizer.without_begin()


def _loaded(source: WeightSource, place: str) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(place)
    except DataError as error:
        raise NoTokenizerError(
            f"{source.directory}: its tokenizer is needed: {error}; name it with --tokenizer"
        ) from error
    check_vocabulary(tokenizer, place, source.model.vocab_size, source.directory)
    return tokenizer
