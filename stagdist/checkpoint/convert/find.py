"""What a conversion reads: a run, a training checkpoint or a model directory, as whole parameters by canonical name."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stagdist.checkpoint.convert.replacing import aside, nameless
from stagdist.checkpoint.published.model_json import read_text_tokens
from stagdist.checkpoint.published.reader import ModelReader
from stagdist.checkpoint.published.record import CHECKSUMS, TAMPERED, read_record
from stagdist.checkpoint.published.safetensors_writer import tensor_sha256
from stagdist.checkpoint.published.writer import CODE_FILES, stored_name
from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.checkpoint.training.directory import COMPLETE, STATE, candidates, checkpoint_damage
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from stagdist.errors import CheckpointError, ConfigError, DataError
from stagdist.parallel.layout import ParameterSpec, model_parameters

LOG = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step_(\d{8,})")


class ChangedTokenizerError(CheckpointError):
    """It is not the one that was written, or that the weights were trained with: it must not quietly take its place."""


class WeightSource(Protocol):
    """Whole parameters of a model."""

    @property
    def directory(self) -> Path:
        """Where they lie."""

    @property
    def model(self) -> ModelConfig:
        """Their model."""

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""

    @property
    def tokens(self) -> TextTokens | None:
        """How their texts begin and end; None where that is said by the tokenizer alone."""

    def weight(self, spec: ParameterSpec) -> Tensor:
        """One of `model_parameters`, whole."""


@dataclass(frozen=True)
class Found:
    """What lies under a path.

    Attributes:
        kind: `training` or `model`.
        directory: the checkpoint or model directory itself.
        files_checked: its files were compared with their records.
    """

    kind: str
    directory: Path
    files_checked: bool = field(default=False, compare=False)


def find(path: str | Path) -> Found:
    """What a path means: a run's folder (or its `checkpoints`) stands for its newest complete checkpoint.

    Damaged ones are passed over with a warning. Where none is whole it is the newest that claims to be, whose damage
    is told when it is opened.

    Raises:
        CheckpointError: nothing of ours is there, or what is meant lost its name when a conversion was killed.
    """
    folder = Path(path)
    if not folder.is_dir():
        _refuse_cut_short([name for name in nameless(folder.parent) if name == folder])
        raise CheckpointError(f"{folder} is no directory; give a run's folder, a checkpoint or a model directory")
    if (folder / STATE).is_file() or (folder / COMPLETE).is_file():
        return Found("training", folder)
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = candidates(checkpoints)
    claiming = [checkpoint for checkpoint in found if (checkpoint / COMPLETE).is_file()]
    chosen = _first_whole(claiming) or (Found("training", claiming[0]) if claiming else None)
    step = -1 if chosen is None else _step(chosen.directory)
    _refuse_cut_short([name for name in nameless(checkpoints) if _step(name) > step])
    if chosen is not None:
        return chosen
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {checkpoints} is complete")
    if (folder / "config.json").is_file():
        return Found("model", folder)
    raise CheckpointError(f"{folder} holds neither checkpoints nor a model directory (there is no config.json)")


def _step(path: Path) -> int:
    """Of a checkpoint by its name; -1 of anything else."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def _refuse_cut_short(names: list[Path]) -> None:
    """A checkpoint that only lacks its name must not be passed over for an older one."""
    if names:
        raise CheckpointError(
            f"{names[-1]} lies in {aside(names[-1]).name} since a conversion that was replacing it was killed; start "
            "that again, or rename the folder"
        )


def _first_whole(checkpoints: list[Path]) -> Found | None:
    for place, checkpoint in enumerate(checkpoints):
        try:
            reason = checkpoint_damage(checkpoint)
        except ConfigError:  # what this release does not understand is no damage; opening it says what it is
            return Found("training", checkpoint)
        if reason is None:
            return Found("training", checkpoint, files_checked=True)
        if place + 1 < len(checkpoints):
            LOG.warning("passing over %s: %s", checkpoint, reason)
    return None


def open_training(path: str | Path, *, trust_pickle: bool = False, files_checked: bool = False) -> TrainingReader:
    """A training checkpoint whose files match their records and the model.

    Args:
        files_checked: the files were just compared with their records.

    Raises:
        CheckpointError: it is none, incomplete, or damaged, by name.
    """
    return _open_checkpoint(find(path), trust_pickle=trust_pickle, files_checked=files_checked)


def _open_checkpoint(found: Found, *, trust_pickle: bool, files_checked: bool) -> TrainingReader:
    if found.kind != "training":
        raise CheckpointError(f"{found.directory} is a model directory; a run's folder or checkpoint is needed here")
    if not (found.directory / COMPLETE).is_file():
        raise CheckpointError(f"{found.directory} has no {COMPLETE}: it is not a complete checkpoint")
    reader = TrainingReader(found.directory, trust_pickle=trust_pickle)
    if not (files_checked or found.files_checked):
        reader.check_files()
    reader.check_layout()
    return reader


def open_model(path: str | Path) -> "ModelSource":
    """A model directory whose tensors match their records and `config.json`.

    Raises:
        CheckpointError: it is none, or damaged, by name.
    """
    return _open_directory(find(path))


def _open_directory(found: Found) -> "ModelSource":
    if found.kind != "model":
        raise CheckpointError(f"{found.directory} is a training checkpoint; a model directory is needed here")
    source = ModelSource(found.directory)
    source.check()
    return source


def open_weights(path: str | Path, *, trust_pickle: bool = False) -> "WeightSource":
    """Either of both."""
    found = find(path)
    if found.kind == "model":
        return _open_directory(found)
    return _open_checkpoint(found, trust_pickle=trust_pickle, files_checked=False)


class ModelSource:
    """A model directory as a source of weights.

    Raises:
        CheckpointError: see `ModelReader`; or the model is one that a StagFormer cannot be, by the key.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._reader = ModelReader(directory)
        self.model, self.dtype = self._reader.model, self._reader.dtype
        self.tokens: TextTokens | None = read_text_tokens(directory)

    @property
    def end_of_document(self) -> int | None:
        """The token that ends a document, the first of several, as the directory says."""
        held = {} if self.tokens is None else self.tokens.generation | self.tokens.config
        token = held.get("eos_token_id")
        return token[0] if isinstance(token, list) else token

    @property
    def recorded(self) -> bool:
        """Whether the directory says what its tensors must be."""
        return bool(self._reader.record.sha256)

    def weight(self, spec: ParameterSpec) -> Tensor:
        """A whole parameter."""
        return self._reader.whole(spec)

    def changed_files(self) -> Iterator[str]:
        """See `WrittenRecord`."""
        return self._reader.record.changed_files()

    def check(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Compare the content of every tensor with what the directory says was written.

        Raises:
            CheckpointError: by name.
        """
        sums = self._reader.record.sha256
        for spec in model_parameters(self.model):
            name, tensor = stored_name(spec.name, self.model), self.weight(spec)
            if sums and tensor_sha256(tensor) != sums[name]:
                raise CheckpointError(
                    f"{name} in {self.directory} has other values than were written ({CHECKSUMS}); {TAMPERED}"
                )
            report(name)


def check_tokenizer(place: str | Path, remedy: str = "") -> None:
    """Compare the tokenizer of a model directory, or a file in one, with what was written there.

    Args:
        remedy: what else helps, for a person.

    Raises:
        ChangedTokenizerError: naming the file.
    """
    folder = Path(place).parent if Path(place).is_file() else Path(place)
    if folder.is_dir() and holds_tokenizer(folder):
        for problem in read_record(folder).changed_files(but=CODE_FILES):
            raise ChangedTokenizerError(f"{folder}: {problem}{remedy}")


def source_tokenizer(source: WeightSource, given: str | None) -> Tokenizer:
    """The tokenizer of a source: as given, else beside a model's weights, else that of the run's configuration.

    Raises:
        ChangedTokenizerError: it is not the one that was written, or that the weights were trained with.
        CheckpointError: there is none, with the option that names one.
    """
    if given is not None:
        return _loaded(source, given)
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
    return tokenizer


def _loaded(source: WeightSource, place: str) -> Tokenizer:
    try:
        return load_tokenizer(place)
    except DataError as error:
        raise CheckpointError(
            f"{source.directory}: its tokenizer is needed: {error}; name it with --tokenizer"
        ) from error
