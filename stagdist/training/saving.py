"""Saving of training state through DeepSpeed: all ranks or none."""

import logging
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from stagdist.checkpoint.training_directory import (
    CONFIG,
    STATE,
    FileRecord,
    TrainingState,
    checkpoint_files,
    checkpoint_name,
    file_record,
    prune,
    publish,
    staging_folder,
    write_complete,
)
from stagdist.config import RunConfig
from stagdist.config_loading import dump_config
from stagdist.errors import CheckpointError
from stagdist.parallel.groups import Groups
from stagdist.training.agreement import on_every_rank
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
        self.written: list[Path] = []

    def save(self, state_dict: object, path: str) -> None:
        """Write one file unless an earlier one has failed."""
        if self.failure is not None:
            return
        try:
            super().save(state_dict, path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:
            free_gb = shutil.disk_usage(Path(path).parent).free / 1e9
            self.failure = f"{path} could not be written, {free_gb:.1f} GB are free: {str(error).splitlines()[0]}"

    def check(self) -> None:
        """Raise what was kept.

        Raises:
            OSError: a file could not be written.
        """
        if self.failure is not None:
            raise OSError(self.failure)


def save_checkpoint(engine: SectionEngine, groups: Groups, config: RunConfig, state: TrainingState) -> Path:
    """Write a complete checkpoint of this step, or leave everything as it was.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    started = time.perf_counter()
    checkpoints = Path(config.folder) / "checkpoints"
    staging, name = staging_folder(checkpoints), checkpoint_name(state.step)

    def failed(reason: str) -> CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        return CheckpointError(
            f"saving failed on {reason}; the previous checkpoint is untouched. Free space or mend the folder and "
            "start the run again: it resumes from there"
        )

    on_every_rank(groups.control, lambda: _prepare(staging, name, config, state), failed)
    on_every_rank(groups.control, lambda: _check_shared(staging / name), failed)
    engine.checkpoint_engine = writer = GuardedWriter()
    engine.save_checkpoint(str(staging), tag=name, client_state=_random_state(), save_latest=False)
    on_every_rank(groups.control, writer.check, failed)
    records = on_every_rank(groups.control, lambda: _records(staging / name, writer.written), failed)
    gathered: list[dict[str, FileRecord]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, records, group=groups.control)
    everything = {file: record for part in gathered for file, record in part.items()}
    on_every_rank(groups.control, lambda: _finish(staging / name, checkpoints / name, everything), failed)
    if dist.get_rank() == 0:
        _prune(checkpoints, config.checkpoint.keep_last, checkpoints / name)
    LOG.info("saved %s in %.1f s", checkpoints / name, time.perf_counter() - started)
    return checkpoints / name


def _prepare(staging: Path, name: str, config: RunConfig, state: TrainingState) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / name).mkdir(parents=True)
        (staging / name / CONFIG).write_text(dump_config(config))
        state.write(staging / name)


def _check_shared(directory: Path) -> None:
    """What rank 0 has written must be visible here, or the checkpoint would be spread over several disks."""
    if not (directory / STATE).is_file():
        raise OSError(f"{directory} is not what rank 0 sees; runs_directory must be on a file system all ranks share")


def _records(directory: Path, written: list[Path]) -> dict[str, FileRecord]:
    """Size and hash of the files of this rank, synced to disk; rank 0 has our own ones besides."""
    names = [path.relative_to(directory).as_posix() for path in written]
    if dist.get_rank() == 0:
        names += [CONFIG, STATE]
    return {name: file_record(directory / name, sync=True) for name in names}


def _finish(staged: Path, final: Path, records: dict[str, FileRecord]) -> None:
    if dist.get_rank() == 0:
        unknown = set(checkpoint_files(staged)) ^ set(records)
        if unknown:
            raise OSError(f"{staged} does not hold exactly what the ranks wrote: {', '.join(sorted(unknown))}")
        write_complete(staged, records)
        publish(staged, final)


def _prune(checkpoints: Path, keep_last: int, newest: Path) -> None:
    """Remove old checkpoints; what cannot be removed costs space, not the run."""
    try:
        prune(checkpoints, keep_last, newest)
    except OSError as error:
        LOG.warning("an old checkpoint could not be removed: %s", error)


def _random_state() -> dict[str, object]:
    """State of torch's generators. Training draws nothing at present; kept so that it may."""
    state: dict[str, object] = {"cpu_random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_random_state"] = torch.cuda.get_rng_state()
    return state
