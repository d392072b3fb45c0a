"""Saving and resuming of training state through DeepSpeed, agreed by all ranks."""

import logging
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from stagdist.checkpoint.training_directory import (
    COMPLETE,
    CONFIG,
    FileRecord,
    TrainingState,
    candidates,
    checkpoint_files,
    checkpoint_name,
    damage,
    file_record,
    prune,
    publish,
    read_complete,
    read_state,
    staging_folder,
    write_complete,
)
from stagdist.config import RunConfig
from stagdist.config_loading import differences, dump_config, load_config
from stagdist.errors import CheckpointError, ConfigError
from stagdist.parallel.groups import Groups
from stagdist.training.engine import SectionEngine

LOG = logging.getLogger(__name__)


class GuardedWriter(TorchCheckpointEngine):
    """DeepSpeed's writer of files, which keeps the first failure instead of raising it.

    A rank that raised in the middle of a save would leave the others waiting in DeepSpeed's barriers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True
        self.failure: str | None = None

    def save(self, state_dict: object, path: str) -> None:
        """Write one file unless an earlier one has failed."""
        if self.failure is not None:
            return
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            free_gb = shutil.disk_usage(Path(path).parent).free / 1e9
            self.failure = f"{path} could not be written, {free_gb:.1f} GB are free: {str(error).splitlines()[0]}"


def save_checkpoint(engine: SectionEngine, groups: Groups, config: RunConfig, state: TrainingState) -> Path:
    """Write a complete checkpoint of this step, or leave everything as it was.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    started = time.perf_counter()
    checkpoints = Path(config.folder) / "checkpoints"
    staging, name = staging_folder(checkpoints), checkpoint_name(state.step)
    writer = GuardedWriter()
    _attempt(groups, staging, writer, lambda: _prepare(staging, name, config, state))
    engine.checkpoint_engine = writer
    engine.save_checkpoint(str(staging), tag=name, client_state=_random_state(), save_latest=False)
    _attempt(groups, staging, writer, lambda: None)
    records = _attempt(groups, staging, writer, lambda: _records(staging / name))
    _attempt(groups, staging, writer, lambda: _finish(staging / name, checkpoints / name, records))
    if dist.get_rank() == 0:
        prune(checkpoints, config.checkpoint.keep_last)
    LOG.info("saved %s in %.1f s", checkpoints / name, time.perf_counter() - started)
    return checkpoints / name


def _attempt(groups, staging, writer, action):  # type: ignore[no-untyped-def]
    """Run `action` on every rank, share failures, and raise the first one everywhere."""
    result = None
    if writer.failure is None:
        try:
            result = action()
        except OSError as error:
            writer.failure = f"{error.filename or staging}: {error.strerror or error}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, writer.failure, group=groups.control)
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"saving failed on rank {failed[0][0]}: {failed[0][1]}; the previous checkpoint is untouched. "
            "Free space or mend the folder and start the run again: it resumes from there"
        )
    return result


def _prepare(staging: Path, name: str, config: RunConfig, state: TrainingState) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / name).mkdir(parents=True)
        (staging / name / CONFIG).write_text(dump_config(config))
        state.write(staging / name)


def _records(directory: Path) -> dict[str, FileRecord]:
    """Size and hash of every file; the work is divided over the ranks."""
    mine = checkpoint_files(directory)[dist.get_rank() :: dist.get_world_size()]
    return {name: file_record(directory / name, sync=True) for name in mine}


def _finish(staged: Path, final: Path, mine: dict[str, FileRecord]) -> None:
    gathered: list[dict[str, FileRecord]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() == 0:
        write_complete(staged, {name: record for part in gathered for name, record in part.items()})
        publish(staged, final)


def _random_state() -> dict[str, object]:
    """State of torch's generators. Training draws nothing at present; kept so that it may."""
    state: dict[str, object] = {"cpu_random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_random_state"] = torch.cuda.get_rng_state()
    return state


def newest_complete(checkpoints: Path, groups: Groups) -> Path | None:
    """The newest checkpoint whose files match their records, the same answer on every rank.

    Every rank checks a share of the files. Damaged ones are passed over with a warning.
    """
    chosen: list[list[Path]] = [candidates(checkpoints) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(chosen, src=0, group=groups.control)
    for path in chosen[0]:
        reason = _shared_damage(path, groups)
        if reason is None:
            return path
        if dist.get_rank() == 0:
            LOG.warning("passing over %s: %s", path, reason)
    return None


def _shared_damage(path: Path, groups: Groups) -> str | None:
    try:
        if not (path / COMPLETE).is_file():
            reason: str | None = f"it has no {COMPLETE}; its writing was cut short"
        else:
            records = read_complete(path)
            reason = damage(path, sorted(records)[dist.get_rank() :: dist.get_world_size()], records)
    except CheckpointError as error:
        reason = str(error)
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason, group=groups.control)
    return next((found for found in reasons if found is not None), None)


def resumed_config(config: RunConfig, checkpoint: Path, groups: Groups) -> RunConfig:
    """The configuration to go on with: that of the new start, with the sample order of the checkpoint.

    Raises:
        ConfigError: the checkpoint is of another model, another order of samples, or another grid.
    """
    before, state = load_config(checkpoint / CONFIG), read_state(checkpoint)
    changed = differences(before.model, config.model)
    if changed:
        listed = ", ".join(f"model.{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(f"{checkpoint} is a checkpoint of another model: {listed}; choose another name for the run")
    for part, key in (("training", "global_batch_size"), ("training", "precision"), ("data", "seed")):
        old, new = getattr(getattr(before, part), key), getattr(getattr(config, part), key)
        if old != new:
            raise ConfigError(f"{checkpoint} was made with {part}.{key} {old!r}, now it is {new!r}; it cannot change")
    if config.data.num_samples not in (None, state.num_samples):
        raise ConfigError(
            f"{checkpoint} was made with data.num_samples {state.num_samples}, now it is {config.data.num_samples}; "
            "the order of samples depends on it, so it cannot change"
        )
    needed = config.training.steps * config.training.global_batch_size
    if needed > state.num_samples:
        raise ConfigError(
            f"training.steps {config.training.steps} need {needed} samples, but the run was begun for "
            f"{state.num_samples}; go up to step {state.num_samples // config.training.global_batch_size}, or begin a "
            "new run with a larger data.num_samples"
        )
    grid = groups.grid
    if state.grid != (grid.pipe, grid.data, grid.tensor):
        raise ConfigError(
            f"{checkpoint} was saved on pipe x data x tensor {'x'.join(map(str, state.grid))}, this run has "
            f"{grid.pipe}x{grid.data}x{grid.tensor}; start it on the same grid"
        )
    data = config.data.model_copy(update={"num_samples": state.num_samples})
    return config.model_copy(update={"data": data})


def load_checkpoint(engine: SectionEngine, checkpoint: Path) -> TrainingState:
    """Fill the engine from a checkpoint that was found complete."""
    engine.checkpoint_engine = GuardedWriter()
    with torch.no_grad():  # DeepSpeed broadcasts tied parameters, which torch would warn of
        path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {checkpoint}")
    torch.set_rng_state(client_state["cpu_random_state"])
    if torch.cuda.is_available() and "cuda_random_state" in client_state:
        torch.cuda.set_rng_state(client_state["cuda_random_state"])
    return read_state(checkpoint)
