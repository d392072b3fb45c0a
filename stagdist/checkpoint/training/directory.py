"""Directories of training checkpoints: state, records, completeness, removal of old ones. Imports no torch.

A checkpoint is complete if and only if its `complete.json`, which is written last, matches the size and sha256 of every
file that its model and grid have. A directory is written under a hidden name and then renamed, so a killed run leaves
nothing that looks complete.
"""

import base64
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stagdist.checkpoint.complete import COMPLETE, damage, read_complete, refuse_undownloaded
from stagdist.checkpoint.text_tokens import TextTokens, recorded_tokens
from stagdist.checkpoint.training.index import INDEX, read_index
from stagdist.errors import CheckpointError, OtherReleaseError
from stagdist.files import FileRecord

STATE = "state.json"
CONFIG = "config.yaml"
_MAX_RANKS = 1 << 20
STEP_FOLDER = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def staging_folder(checkpoints: Path) -> Path:
    """Hidden folder in which a checkpoint is written before it is renamed."""
    return checkpoints / ".saving"


@dataclass(frozen=True)
class TrainingState:
    """The position of a training run and what it depends on.

    Attributes:
        step: optimizer steps done.
        consumed_samples: training sequences read by all replicas.
        num_samples: number of sequences that the order of samples was computed for; constant during a run, also when
            `training.steps` is raised beyond it.
        grid: (pipe, data, tensor) sizes of the run that wrote the checkpoint; any other grid can load it.
        bad_steps: steps skipped because of values that were not finite.
        optimizer_steps: updates that Adam's moments have seen.
        loss_scaler: state of the fp16 loss scaler; None in other precisions.
        generators: states of torch's random generators in base64, by device, for every (stage, tensor rank) in the
            order of ranks.
        data_identity: hash of the training corpora and the tokenizer.
        tokenizer: fingerprint of the tokenizer; empty if it is unknown.
        documents_begin: the training documents begin with the special tokens that the tokenizer puts before a text, or
            it has none; False for checkpoints that were written before this was recorded.
        text_tokens: special tokens of the imported model directory; None where only the tokenizer defines them.
        format_version: version of `state.json`.
    """

    step: int
    consumed_samples: int
    num_samples: int
    grid: tuple[int, int, int]
    bad_steps: int = 0
    optimizer_steps: int = 0
    loss_scaler: dict[str, int | float | bool] | None = None
    generators: tuple[dict[str, str], ...] = ()
    data_identity: str = ""
    tokenizer: str = ""
    documents_begin: bool = False
    text_tokens: TextTokens | None = None
    format_version: int = 2

    def as_text(self) -> str:
        """The content of `state.json`. The key `text_tokens` is absent if there are none."""
        body = asdict(self)
        if self.text_tokens is None:
            del body["text_tokens"]
        return json.dumps(body, indent=2) + "\n"

    def write(self, directory: Path) -> None:
        """Store as `state.json`."""
        (directory / STATE).write_text(self.as_text())


def read_state(directory: Path) -> TrainingState:
    """Read `state.json`.

    Raises:
        CheckpointError: it is missing or damaged, or the folder has the name of another step.
    """
    try:
        refuse_undownloaded(directory / STATE)
        values = json.loads((directory / STATE).read_text())
        if values.get("format_version") == 1:
            raise OtherReleaseError(
                f"{directory} was written by a release that stored DeepSpeed's files; export it with that release, and "
                "import the model directory"
            )
        tokens = recorded_tokens(values.get("text_tokens"), directory / STATE)
        tuples = {"grid": tuple(values["grid"]), "generators": tuple(values.get("generators", ()))}
        state = TrainingState(**{**values, **tuples, "text_tokens": tokens})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory / STATE} cannot be read: {error}") from error
    _check_state(state, directory / STATE)
    if (named := STEP_FOLDER.fullmatch(directory.name)) and int(named[1]) != state.step:
        name = checkpoint_name(state.step)
        raise CheckpointError(f"{directory} is of step {state.step}; rename it to {name}, or remove it")
    return state


def _check_state(state: TrainingState, path: Path) -> None:
    counts = (state.step, state.consumed_samples, state.num_samples, state.bad_steps, state.optimizer_steps)
    sizes = all(type(size) is int and size > 0 for size in state.grid)
    if len(state.grid) != 3 or not sizes or math.prod(state.grid) > _MAX_RANKS:
        raise CheckpointError(f"{path}: grid is {list(state.grid)}; three sizes of 1 to {_MAX_RANKS} ranks are needed")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise CheckpointError(f"{path}: its counts are {list(counts)}; numbers of 0 or more are needed")
    for key in ("data_identity", "tokenizer"):
        if not isinstance(getattr(state, key), str):
            raise CheckpointError(f"{path}: {key} is {getattr(state, key)!r}; a string is needed")
    if not isinstance(state.documents_begin, bool):
        raise CheckpointError(f"{path}: documents_begin is {state.documents_begin!r}; true or false is needed")
    scaler = state.loss_scaler
    if scaler is not None and not (
        isinstance(scaler, dict) and all(isinstance(v, int | float) for v in scaler.values())
    ):
        raise CheckpointError(f"{path}: loss_scaler is {scaler!r}; numbers by name are needed")
    for held in state.generators:
        if not isinstance(held, dict) or "cpu" not in held or not all(map(_is_base64, held.values())):
            raise CheckpointError(f"{path}: generators must hold states in base64 by device")
    if state.format_version != 2:
        raise OtherReleaseError(f"{path}: format_version is {state.format_version!r}; this release reads 2")


def coverage_damage(directory: Path, records: Mapping[str, FileRecord]) -> str | None:
    """The reason why the records do not cover exactly the files of the checkpoint; None if they do.

    Raises:
        CheckpointError: `index.json` is damaged.
    """
    described = {CONFIG, STATE, INDEX}
    if unrecorded := sorted(described - set(records)):
        read_state(directory)  # names a checkpoint of an earlier release, which had no index
        return f"{COMPLETE} has no record of {unrecorded[0]}"
    if reason := damage(directory, sorted(described), records):
        return reason
    expected = described | read_index(directory).files()
    if odd := sorted(expected ^ set(records)):
        return f"{COMPLETE} has {'no' if odd[0] in expected else 'a'} record of {odd[0]}, which {INDEX} " + (
            "names" if odd[0] in expected else "does not name"
        )
    return None


def _is_base64(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(base64.b64decode(value, validate=True))
    except ValueError:
        return False


def checkpoint_damage(directory: Path, *, contents: bool = True) -> str | None:
    """The first reason why a directory is not a complete checkpoint; None if it is one.

    Args:
        contents: compare the contents of the safetensors files too, not only their sizes.

    Raises:
        OtherReleaseError: it is of a version of the format that this release does not read.
    """
    try:
        records = read_complete(directory)
        reason = coverage_damage(directory, records)
        return reason or damage(directory, sorted(records), records, contents=contents)
    except OtherReleaseError:
        raise
    except CheckpointError as error:
        return str(error)


def candidates(checkpoints: Path) -> list[Path]:
    """Directories with the name of a checkpoint, complete or not, newest first."""
    if not checkpoints.is_dir():
        return []
    named = ((STEP_FOLDER.fullmatch(path.name), path) for path in checkpoints.iterdir() if path.is_dir())
    found = [(int(match.group(1)), path) for match, path in named if match]
    return [path for _, path in sorted(found, reverse=True)]


def withdraw(directory: Path) -> None:
    """Mark a checkpoint as damaged, so that it is not used again."""
    marker = directory / COMPLETE
    if marker.is_file():
        marker.rename(directory / "damaged.json")


def prune(checkpoints: Path, keep_last: int, newest: Path) -> None:
    """Keep the `keep_last` newest complete checkpoints up to `newest`, which was just saved; 0 keeps all.

    Incomplete checkpoints and those of later steps are not removed.
    """
    if keep_last == 0:
        return
    found = candidates(checkpoints)
    upto = found[found.index(newest) :]
    complete = [path for path in upto if (path / COMPLETE).is_file()]
    for path in complete[keep_last:]:
        # First the marker: an interrupted removal must not leave a directory that looks complete.
        (path / COMPLETE).unlink()
        shutil.rmtree(path)
