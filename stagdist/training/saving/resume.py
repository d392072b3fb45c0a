"""Going on from a checkpoint: which one, whether it fits, onto this grid, and back into the engine."""

import io
import logging
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.serialization import safe_globals

from stagdist.checkpoint.convert.staging import ConversionOptions, exclusive, put_back
from stagdist.checkpoint.convert.training_conversions import reshard
from stagdist.checkpoint.training.directory import (
    COMPLETE,
    CONFIG,
    TrainingState,
    candidates,
    coverage_damage,
    damage,
    read_complete,
    read_state,
    withdraw,
)
from stagdist.checkpoint.training.pickles import ENUM_MEMBER, refusal
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.checkpoint.training.stage_files import tensor_files
from stagdist.config.loading import differences, load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError, ConfigError, StagdistError
from stagdist.parallel.groups import Groups
from stagdist.telemetry.pulse import Phase, Pulse, beating
from stagdist.training.engine.agreement import shared, while_others_wait
from stagdist.training.engine.section_engine import SectionEngine

LOG = logging.getLogger(__name__)

_MAY_CHANGE = ("num_samples", "cache_directory", "tokenizer", "validation_corpora", "test_corpora")
"""Keys of `data` that leave the training samples as they are; tokenizer and corpora are compared by content."""

_LOCK = ".for-a-grid.lock"
"""Held beside the checkpoints by the run that converts one."""


def newest_complete(checkpoints: Path, groups: Groups) -> Path | None:
    """The newest checkpoint whose files match their records, the same answer on every rank; None in a new run.

    Every rank checks a share of the files. Damaged ones are passed over with a warning and lose their marker.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: starting over would be a silent loss; or a conversion
            is replacing one now.
    """
    _put_back(checkpoints, groups)
    chosen: list[list[Path]] = [candidates(checkpoints) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(chosen, src=0, group=groups.control)
    for path in chosen[0]:
        reason = _shared_damage(path, groups)
        if reason is None:
            return path
        if dist.get_rank() == 0:
            LOG.warning("passing over %s: %s", path, reason)
            withdraw(path)
    if chosen[0]:
        raise shared(
            CheckpointError(
                f"none of the {len(chosen[0])} checkpoints in {checkpoints} is whole; restore one, or move the folder "
                "away to begin anew"
            )
        )
    return None


def _put_back(checkpoints: Path, groups: Groups) -> None:
    """A checkpoint that lost its name to a killed conversion has it again; rank 0 renames."""

    def rename() -> None:
        for path in put_back(checkpoints):
            LOG.warning("%s has its name back: a conversion was killed while it replaced it", path)

    try:
        while_others_wait(groups.control, rename, lambda: None)  # a matter of moments
    except CheckpointError as error:
        raise shared(error) from error


def _shared_damage(path: Path, groups: Groups) -> str | None:
    try:
        if not (path / COMPLETE).is_file():
            reason: str | None = f"it has no {COMPLETE}: its writing was cut short, or it was found damaged before"
        else:
            records = read_complete(path)
            mine = sorted(records)[dist.get_rank() :: dist.get_world_size()]
            reason = coverage_damage(path, records) or damage(path, mine, records)
    except CheckpointError as error:
        reason = str(error)
    except ConfigError as error:
        raise shared(ConfigError(f"{path}: {error}")) from error
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason, group=groups.control)
    return next((found for found in reasons if found is not None), None)


def resumed_config(config: RunConfig, checkpoint: Path, data_identity: str, tokenizer: str) -> RunConfig:
    """The configuration to go on with: that of the new start, with the sample order of the checkpoint.

    An imported checkpoint, which has seen no samples, goes with any of its tokenizer.

    Args:
        tokenizer: fingerprint of this run's.

    Raises:
        ConfigError: the checkpoint is of another model, precision or tokenizer, or of other samples; on every rank.
    """
    before, state = load_config(checkpoint / CONFIG), read_state(checkpoint)
    problem = _model_problem(before, config) or (
        _precision_problem(before, config) or _tokenizer_problem(state, config, tokenizer)
        if _imported(state)
        else _samples_problem(before, config, state, data_identity)
    )
    if problem:
        raise shared(ConfigError(f"{checkpoint} {problem}"))
    if _imported(state):
        return config
    data = config.data.model_copy(update={"num_samples": state.num_samples})
    return config.model_copy(update={"data": data})


def _model_problem(before: RunConfig, config: RunConfig) -> str | None:
    changed = differences(before.model, config.model)
    if not changed:
        return None
    listed = ", ".join(f"model.{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
    return f"is a checkpoint of another model: {listed}; choose another name for the run"


def _samples_problem(before: RunConfig, config: RunConfig, state: TrainingState, data_identity: str) -> str | None:
    """Why the run would not see the samples it would have seen."""
    changed = {
        f"data.{key}": values
        for key, values in differences(before.data, config.data).items()
        if not key.startswith(_MAY_CHANGE) and not key.endswith(".prefix")
    }
    pairs = (("training", "global_batch_size"), ("training", "precision"))
    changed |= {
        f"{part}.{key}": (getattr(getattr(before, part), key), getattr(getattr(config, part), key))
        for part, key in pairs
        if getattr(getattr(before, part), key) != getattr(getattr(config, part), key)
    }
    if config.data.num_samples not in (None, state.num_samples):
        changed["data.num_samples"] = (state.num_samples, config.data.num_samples)
    if changed:
        listed = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        return f"would not go on with the same samples: {listed}; restore it, or begin a new run"
    if data_identity != state.data_identity:
        return "was trained on other corpora, or with another tokenizer, than now lie under their paths; restore them"
    needed = config.training.steps * config.training.global_batch_size
    if needed > state.num_samples:
        return (
            f"was begun for {state.num_samples} samples, but training.steps {config.training.steps} need {needed}; go "
            f"up to step {state.num_samples // config.training.global_batch_size}, or begin a new run with a larger "
            "data.num_samples"
        )
    return None


def _imported(state: TrainingState) -> bool:
    return state.num_samples == 0


def _precision_problem(before: RunConfig, config: RunConfig) -> str | None:
    old, new = before.training.precision, config.training.precision
    if old == new:
        return None
    return (
        f"was imported for training.precision {old}, this run has {new}; import it again with --config and the "
        "configuration of this run"
    )


def _tokenizer_problem(state: TrainingState, config: RunConfig, tokenizer: str) -> str | None:
    """Why an imported model would misread the ids of this run; where no tokenizer was recorded, nothing is compared."""
    if state.tokenizer in ("", tokenizer):
        return None
    named = config.data.tokenizer
    return (
        f"was imported with another tokenizer than data.tokenizer {named} holds: its sha256 is "
        f"{state.tokenizer[:12]}, that of {named} {tokenizer[:12]}; set data.tokenizer to the one of the import, or "
        f"import the model again with --tokenizer {named}"
    )


@contextmanager
def on_this_grid(
    checkpoint: Path, config: RunConfig, groups: Groups, pulse: Pulse, *, trust_pickle: bool = False
) -> Iterator[Path]:
    """The checkpoint as this run's grid needs it: itself, or a copy that rank 0 makes and that goes after loading.

    Args:
        pulse: signs of life while it is converted.
        trust_pickle: see `load_file`.

    Raises:
        CheckpointError: on every rank, when it could not be converted.
    """
    state, grid = read_state(checkpoint), groups.grid
    if state.grid == (grid.pipe, grid.data, grid.tensor):
        if dist.get_rank() == 0:
            _remove_leftovers(checkpoint.parent)
        yield checkpoint
        return
    hidden = checkpoint.parent / f".for-{grid.pipe}x{grid.data}x{grid.tensor}"
    saved_on = "x".join(map(str, state.grid))
    LOG.info(
        "%s was saved on pipe x data x tensor %s, this run has %dx%dx%d: rank 0 converts it, the others wait",
        checkpoint, saved_on, grid.pipe, grid.data, grid.tensor,
    )  # fmt: skip
    started = time.perf_counter()

    held = ExitStack()

    def convert() -> None:
        held.enter_context(_converting(checkpoint.parent))
        options = ConversionOptions(files_checked=True, trust_pickle=trust_pickle, track=beating(pulse, Phase.START))
        proof = reshard(checkpoint, hidden / checkpoint.name, grid, options, config=config)
        LOG.info("converted it in %.1f s: %s", time.perf_counter() - started, proof.checked)

    with held:  # also when loading fails, the copy goes
        try:
            while_others_wait(groups.control, convert, lambda: pulse.beat(Phase.START))
        except StagdistError as error:
            raise shared(CheckpointError(f"{checkpoint} could not be brought to this grid: {error}")) from error
        yield hidden / checkpoint.name
        dist.barrier(group=groups.control)


@contextmanager
def _converting(checkpoints: Path) -> Iterator[None]:
    """Nobody else makes copies for a grid there; none is left before, and none after."""
    with exclusive(checkpoints / _LOCK, f"another run is converting a checkpoint in {checkpoints}"):
        _remove_copies(checkpoints)
        try:
            yield
        finally:
            _remove_copies(checkpoints)


def _remove_copies(checkpoints: Path) -> None:
    for copy in checkpoints.glob(".for-*x*x*"):
        shutil.rmtree(copy, ignore_errors=True)


def _remove_leftovers(checkpoints: Path) -> None:
    """Copies of a run that was killed go, also when nothing has to be converted now; those in use stay."""
    if not any(checkpoints.glob(".for-*")):
        return
    try:
        with _converting(checkpoints):
            LOG.info("removed copies for another grid that a killed run had left in %s", checkpoints)
    except (CheckpointError, OSError) as error:
        LOG.warning("copies for another grid are left in %s: %s", checkpoints, error)


class RestrictedReader(TorchCheckpointEngine):
    """DeepSpeed's reader of files, which refuses what could run a program: a checkpoint may come from a stranger.

    Args:
        trust_pickle: read such files all the same, and run what they say.
    """

    def __init__(self, *, trust_pickle: bool = False) -> None:
        super().__init__()
        self._trust_pickle = trust_pickle

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file.

        Raises:
            CheckpointError: it asks for more than tensors, plain containers and DeepSpeed's own few types.
        """
        if self._trust_pickle:
            return torch.load(path, map_location=map_location, weights_only=False)
        try:
            with safe_globals([ENUM_MEMBER, fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(refusal(Path(path), error)) from error


def load_checkpoint(
    engine: SectionEngine, checkpoint: Path, config: RunConfig, *, trust_pickle: bool = False
) -> TrainingState:
    """Fill the engine from a checkpoint that was found complete and is of this grid; `trust_pickle`: see `load_file`.

    Raises:
        CheckpointError: on every rank: DeepSpeed finds nothing in it, or a file could run a program and is not
            trusted, or is not what DeepSpeed writes.
    """
    if not trust_pickle:
        _check_readable(checkpoint, engine)
    engine.checkpoint_engine = RestrictedReader(trust_pickle=trust_pickle)
    # DeepSpeed prints, and broadcasts tied parameters, which torch would warn of.
    with redirect_stdout(io.StringIO()), torch.no_grad():
        path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise shared(CheckpointError(f"DeepSpeed found nothing to load in {checkpoint}"))
    _apply_settings(engine, config)
    torch.set_rng_state(client_state["cpu_random_state"])
    if torch.cuda.is_available() and "cuda_random_state" in client_state:
        torch.cuda.set_rng_state(client_state["cuda_random_state"])
    return read_state(checkpoint)


def _check_readable(checkpoint: Path, engine: SectionEngine) -> None:
    """Every rank opens a share of the files before DeepSpeed loads them together: there one refusal is a hang.

    Raises:
        CheckpointError: on every rank, by the first file that will not do.
    """
    problem: str | None = None
    try:
        reader = TrainingReader(checkpoint)
        names = sorted(tensor_files(reader.model, reader.state.grid, bf16=reader.bf16))
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            reader.file(name)
    except StagdistError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=engine.control)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise shared(CheckpointError(first))


def begun(state: TrainingState, config: RunConfig, data_identity: str, tokenizer: str = "") -> TrainingState:
    """The state to go on with: an imported checkpoint takes the samples of this run."""
    if not _imported(state):
        return state
    return replace(state, num_samples=config.num_samples, data_identity=data_identity, tokenizer=tokenizer)


def _apply_settings(engine: SectionEngine, config: RunConfig) -> None:
    """The configuration decides, not the settings that DeepSpeed stored with the optimizer's state."""
    matrices, vectors = engine.optimizer.param_groups
    for group, weight_decay in ((matrices, config.optimizer.weight_decay), (vectors, 0.0)):
        group["betas"], group["eps"] = config.optimizer.betas, config.optimizer.eps
        group["weight_decay"] = weight_decay
    engine.optimizer.clip_grad = config.optimizer.max_grad_norm
