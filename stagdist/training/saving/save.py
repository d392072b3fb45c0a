"""Saving of training state, during training or while it waits: complete on all ranks, or not at all."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from stagdist.checkpoint.complete import checkpoint_files, publish, write_complete
from stagdist.checkpoint.training.directory import CONFIG, STATE, TrainingState, checkpoint_name, prune, staging_folder
from stagdist.config.loading import dump_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError, SavingError
from stagdist.files import FileRecord, file_record
from stagdist.parallel.groups import Groups
from stagdist.training.engine.agreement import Writing, on_every_rank
from stagdist.training.engine.deepspeed_adapter import FileWriter
from stagdist.training.engine.section_engine import SectionEngine
from stagdist.training.saving.file_writing import BackgroundWrite, write_file
from stagdist.training.saving.host_copies import Capture, HostCopies

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

GIVE_UP_S = 5.0
"""How long an abandoned write may take to stop."""


class GuardedWriter:
    """Writes and hashes the files of one save.

    A failure is kept, not raised: a rank that raised in the middle of a save would leave the others waiting in
    DeepSpeed's barriers.
    """

    def __init__(self) -> None:
        self._failure: str | None = None
        self._records: dict[Path, FileRecord] = {}
        self._never = threading.Event()

    def write(self, content: object, path: str) -> None:
        """Write one file unless an earlier one has failed."""
        if self._failure is not None:
            return
        try:
            self._records[Path(path)] = write_file(content, Path(path), self._never)
        except OSError as error:
            self._failure = str(error)

    def check(self) -> None:
        """Raise the failure, if any.

        Raises:
            OSError: a file could not be written.
        """
        if self._failure is not None:
            raise OSError(self._failure)

    def records(self) -> dict[Path, FileRecord]:
        """Size and hash of every file."""
        return self._records


@dataclass(frozen=True)
class _Save:
    """A save whose files are being written in the folder `staged`, which is renamed to `final`."""

    staged: Path
    final: Path
    written: GuardedWriter | BackgroundWrite
    started: float
    paused_s: float


class Saver:
    """Saves training state: complete on all ranks, or nothing changes. At most one save is under way.

    Every method but `vote` and `close` is called on all ranks at the same time.
    """

    def __init__(self, engine: SectionEngine, groups: Groups, config: RunConfig):
        self._engine, self._groups, self._config = engine, groups, config
        self._checkpoints = Path(config.folder) / "checkpoints"
        self._copies = HostCopies()
        self._under_way: _Save | None = None
        self._pruning: threading.Thread | None = None

    @property
    def under_way(self) -> bool:
        """Whether a save has begun and is not complete yet; the same on every rank."""
        return self._under_way is not None

    def due(self, step: int) -> bool:
        """Whether `checkpoint.interval_steps` asks for a save after `step`."""
        interval = self._config.checkpoint.interval_steps
        return interval > 0 and step % interval == 0

    def vote(self) -> Writing:
        """How far this rank's files have come."""
        written = self._under_way.written if self._under_way is not None else None
        if not isinstance(written, BackgroundWrite):
            return Writing.NONE
        return Writing.FAILED if written.failed else Writing.RUNNING if written.running else Writing.NONE

    def save(self, state: TrainingState, *, wait: bool = False) -> Path:
        """Begin a checkpoint of this step; `finish` completes it once its files are written.

        Args:
            wait: complete it here. So does `checkpoint.asynchronous: false`.

        Returns: the folder of the checkpoint.

        Raises:
            CheckpointError: on every rank, when any rank could not write this save or the one before it.
        """
        self._wait_for_earlier(state.step)
        started, wait = time.perf_counter(), wait or not self._config.checkpoint.asynchronous
        staging, name = staging_folder(self._checkpoints), checkpoint_name(state.step)
        with self._all_or_nothing(None):
            self._on_every_rank(lambda: _prepare(staging, name, self._config, state))
            self._on_every_rank(lambda: _check_shared(staging / name))
            written = self._write(staging, name) if wait else self._capture(staging, name)
        paused_s = time.perf_counter() - started
        self._under_way = _Save(staging / name, self._checkpoints / name, written, started, paused_s)
        if wait:
            self.finish()
        return self._checkpoints / name

    def finish(self) -> None:
        """Wait for the files of the save under way, if any, and publish them as the newest checkpoint.

        Raises:
            CheckpointError: on every rank, when any rank could not write.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return
        with self._all_or_nothing(save.written):
            self._on_every_rank(save.written.check)
            records = self._on_every_rank(lambda: _records(save.staged, save.written.records()))
            gathered: list[dict[str, FileRecord]] = [{}] * dist.get_world_size()
            dist.all_gather_object(gathered, records, group=self._groups.control)
            everything = {file: record for part in gathered for file, record in part.items()}
            self._on_every_rank(lambda: _finish(save.staged, save.final, everything))
        self._prune(save)
        total_s, note = time.perf_counter() - save.started, ""
        if isinstance(save.written, BackgroundWrite):
            note = f", during training except for {save.paused_s:.2f} s"
        LOG.info("saved %s in %.1f s%s", save.final, total_s, note)

    def close(self) -> None:
        """Abandon the save under way: the run ends with an error that the other ranks may not have seen."""
        save, self._under_way = self._under_way, None
        if save is not None and isinstance(save.written, BackgroundWrite):
            save.written.give_up(GIVE_UP_S)
        if self._pruning is not None:
            self._pruning.join(GIVE_UP_S)

    def release(self) -> None:
        """Release the buffers of asynchronous saves. Waits for the device; do not call it after an error."""
        self._copies.close()

    def _prune(self, save: _Save) -> None:
        """Remove old checkpoints, in the background where the save was: a file system takes a while for it."""
        if dist.get_rank() != 0:
            return
        if self._pruning is not None:
            self._pruning.join()
        arguments = self._checkpoints, self._config.checkpoint.keep_last, save.final
        self._pruning = threading.Thread(target=_prune, args=arguments, name="checkpoint-pruner", daemon=True)
        self._pruning.start()
        if not isinstance(save.written, BackgroundWrite):
            self._pruning.join()

    def _wait_for_earlier(self, step: int) -> None:
        if self._under_way is None:
            return
        started, earlier = time.perf_counter(), self._under_way.final.name
        self.finish()
        waited_s = time.perf_counter() - started
        LOG.info("the save of step %d waited %.1f s for that of %s", step, waited_s, earlier)

    def _capture(self, staging: Path, name: str) -> BackgroundWrite:
        capture = Capture(self._copies)
        self._engine.write_files(FileWriter(capture.write, copies=True), staging, name, _random_state())
        return BackgroundWrite(self._on_every_rank(capture.files))

    def _write(self, staging: Path, name: str) -> GuardedWriter:
        writer = GuardedWriter()
        self._engine.write_files(FileWriter(writer.write, copies=False), staging, name, _random_state())
        return writer

    def _on_every_rank(self, action: Callable[[], Result]) -> Result:
        return on_every_rank(self._groups.control, action, _failed)

    @contextmanager
    def _all_or_nothing(self, written: GuardedWriter | BackgroundWrite | None) -> Iterator[None]:
        """Remove the files of the save when the block fails, as it then does on all ranks."""
        try:
            yield
        except CheckpointError:
            if isinstance(written, BackgroundWrite):
                written.give_up(GIVE_UP_S)
            dist.barrier(group=self._groups.control)  # no rank writes any more
            if dist.get_rank() == 0:
                shutil.rmtree(staging_folder(self._checkpoints), ignore_errors=True)
            raise


def save_checkpoint(engine: SectionEngine, groups: Groups, config: RunConfig, state: TrainingState) -> Path:
    """Write a complete checkpoint of this step and wait for it.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    return Saver(engine, groups, config).save(state, wait=True)


def _failed(reason: str) -> SavingError:
    return SavingError(
        f"saving failed on {reason}; the previous checkpoint is untouched. Free space or repair the folder, and "
        "start the run again: it resumes from there"
    )


def _prepare(staging: Path, name: str, config: RunConfig, state: TrainingState) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / name).mkdir(parents=True)
        (staging / name / CONFIG).write_text(dump_config(config))
        state.write(staging / name)


def _check_shared(directory: Path) -> None:
    """Check that files of rank 0 are visible here; otherwise the checkpoint would be spread over several disks."""
    if not (directory / STATE).is_file():
        raise OSError(f"{directory} is not what rank 0 sees; runs_directory must be on a file system all ranks share")


def _records(directory: Path, written: Mapping[Path, FileRecord]) -> dict[str, FileRecord]:
    """Size and hash of this rank's files, which are on the disk; rank 0 adds those that it wrote itself."""
    records = {path.relative_to(directory).as_posix(): record for path, record in written.items()}
    if dist.get_rank() == 0:
        records |= {name: file_record(directory / name, sync=True) for name in (CONFIG, STATE)}
    return records


def _finish(staged: Path, final: Path, records: dict[str, FileRecord]) -> None:
    if dist.get_rank() == 0:
        unknown = set(checkpoint_files(staged)) ^ set(records)
        if unknown:
            raise OSError(f"{staged} does not hold exactly what the ranks wrote: {', '.join(sorted(unknown))}")
        write_complete(staged, records)
        publish(staged, final)


def _prune(checkpoints: Path, keep_last: int, newest: Path) -> None:
    """Remove old checkpoints. A failure is logged only: it costs space, not the run."""
    try:
        prune(checkpoints, keep_last, newest)
    except OSError as error:
        LOG.warning("an old checkpoint could not be removed: %s", error)


def _random_state() -> dict[str, object]:
    """State of torch's generators. Training draws no random numbers today; the state is saved for when it does."""
    state: dict[str, object] = {"cpu_random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_random_state"] = torch.cuda.get_rng_state()
    return state
