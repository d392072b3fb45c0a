"""Find and open the source of a conversion: a run, a training checkpoint or a model directory."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from stagdist.checkpoint.complete import COMPLETE
from stagdist.checkpoint.convert.replaced import aside, nameless
from stagdist.checkpoint.published.model_reader import ChangedTokenizerError, ModelReader, check_tokenizer
from stagdist.checkpoint.published.other_formats import weights_there
from stagdist.checkpoint.training.directory import STATE, candidates, checkpoint_damage
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.checkpoint.weight_source import WeightSource
from stagdist.data.compatibility import check_vocabulary
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import CheckpointError, ConfigError, DataError

LOG = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class FoundCheckpoint:
    """What a path refers to.

    Attributes:
        kind: `training` or `model`.
        directory: the checkpoint or model directory.
        files_checked: the files were compared with their records.
    """

    kind: str
    directory: Path
    files_checked: bool = field(default=False, compare=False)


def find(path: str | Path) -> FoundCheckpoint:
    """Find what a path refers to: the folder of a run (or its `checkpoints`) means its newest complete checkpoint.

    Damaged checkpoints are skipped with a warning. If all are damaged, the newest one with a `complete.json` is
    returned, and opening it reports the damage.

    Raises:
        CheckpointError: there is neither a checkpoint nor a model directory, or a killed conversion left the newest
            one under its hidden name.
    """
    folder = Path(path)
    if not folder.is_dir():
        _refuse_cut_short([name for name in nameless(folder.parent) if name == folder])
        raise CheckpointError(f"{folder} is no directory; give a run's folder, a checkpoint or a model directory")
    if (folder / STATE).is_file() or (folder / COMPLETE).is_file():
        return FoundCheckpoint("training", folder)
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = candidates(checkpoints)
    claiming = [checkpoint for checkpoint in found if (checkpoint / COMPLETE).is_file()]
    chosen = _first_complete(claiming) or (FoundCheckpoint("training", claiming[0]) if claiming else None)
    step = -1 if chosen is None else _step(chosen.directory)
    _refuse_cut_short([name for name in nameless(checkpoints) if _step(name) > step])
    if chosen is not None:
        return chosen
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {checkpoints} is complete")
    if (folder / "config.json").is_file():
        return FoundCheckpoint("model", folder)
    there = f": {weights}" if (weights := weights_there(folder)) else ""
    raise CheckpointError(f"{folder} holds neither checkpoints nor a model directory (there is no config.json){there}")


def _step(path: Path) -> int:
    """The step in the name of a checkpoint; -1 for other names."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def _refuse_cut_short(names: list[Path]) -> None:
    """Refuse to fall back to an older checkpoint when a newer one is only kept aside."""
    if names:
        raise CheckpointError(
            f"{names[-1]} is in {aside(names[-1]).name} because a conversion that was replacing it was killed; "
            "start that conversion again, or rename the folder"
        )


def _first_complete(checkpoints: list[Path]) -> FoundCheckpoint | None:
    for index, checkpoint in enumerate(checkpoints):
        try:
            reason = checkpoint_damage(checkpoint)
        except ConfigError:  # not damage but a configuration of another release: opening it reports the key
            return FoundCheckpoint("training", checkpoint)
        if reason is None:
            return FoundCheckpoint("training", checkpoint, files_checked=True)
        if index + 1 < len(checkpoints):
            LOG.warning("skipping %s: %s", checkpoint, reason)
    return None


def open_training(path: str | Path) -> TrainingReader:
    """Open a training checkpoint and check that its files match their records and the model.

    Raises:
        CheckpointError: this is no training checkpoint, or it is incomplete or damaged; the message names the file.
    """
    return _open_checkpoint(find(path), files_checked=False)


def _open_checkpoint(found: FoundCheckpoint, *, files_checked: bool) -> TrainingReader:
    if found.kind != "training":
        raise CheckpointError(f"{found.directory} is a model directory; a run's folder or checkpoint is needed here")
    if not (found.directory / COMPLETE).is_file():
        raise CheckpointError(f"{found.directory} has no {COMPLETE}: it is not a complete checkpoint")
    reader = TrainingReader(
        found.directory,
    )
    if not (files_checked or found.files_checked) and (reason := checkpoint_damage(reader.directory)):
        raise CheckpointError(f"{reader.directory}: {reason}")
    return reader


def open_model(path: str | Path) -> ModelReader:
    """Open a model directory and check that its tensors match their records and `config.json`.

    Raises:
        CheckpointError: this is no model directory, or it is damaged; the message names the tensor.
    """
    return _open_directory(find(path))


def _open_directory(found: FoundCheckpoint) -> ModelReader:
    if found.kind != "model":
        raise CheckpointError(f"{found.directory} is a training checkpoint; a model directory is needed here")
    source = ModelReader(found.directory)
    source.check()
    return source


def open_weights(path: str | Path) -> WeightSource:
    """Open a training checkpoint or a model directory and check it."""
    found = find(path)
    if found.kind == "model":
        return _open_directory(found)
    return _open_checkpoint(found, files_checked=False)


def source_tokenizer(source: WeightSource, given: str | None) -> Tokenizer:
    """Load the tokenizer of a source: the given one, else that of the model directory or of the configuration.

    It puts no special tokens before a text if the documents of the training had none.

    Raises:
        ChangedTokenizerError: it is not the one that was written, or not the one of the training.
        CheckpointError: there is none.
        DataError: it gives text ids that the model lacks.
    """
    begins = not isinstance(source, TrainingReader) or source.state.documents_begin
    if given is not None:
        tokenizer = _loaded(source, given)
        return tokenizer if begins else tokenizer.without_begin()
    place = source.config.data.tokenizer if isinstance(source, TrainingReader) else str(source.directory)
    check_tokenizer(place, "; --tokenizer names another")
    tokenizer = _loaded(source, place)
    now = tokenizer.fingerprint
    before = source.state.tokenizer if isinstance(source, TrainingReader) else now
    if before not in ("", now):
        raise ChangedTokenizerError(
            f"{source.directory} was trained with another tokenizer than {place} holds now: its sha256 was "
            f"{before[:12]}, is {now[:12]}; restore it, or name one with --tokenizer"
        )
    return tokenizer if begins else tokenizer.without_begin()


def _loaded(source: WeightSource, place: str) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(place)
    except DataError as error:
        raise CheckpointError(
            f"{source.directory}: its tokenizer is needed: {error}; name it with --tokenizer"
        ) from error
    check_vocabulary(tokenizer, place, source.model.vocab_size, source.directory)
    return tokenizer
