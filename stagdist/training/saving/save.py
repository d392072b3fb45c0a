"""Saving of training state, during training or while it waits: complete on all ranks, or not at all."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch.distributed as dist

from stagdist.checkpoint.complete import checkpoint_files, damage, publish
from stagdist.checkpoint.training.directory import TrainingState, checkpoint_name, prune, staging_folder
from stagdist.checkpoint.training.index import Fragment, index_of
from stagdist.checkpoint.training.writer import complete, part_name
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError, SavingError
from stagdist.files import FileRecord
from stagdist.parallel.groups import Groups
from stagdist.parallel.layout import model_parameters
from stagdist.training.engine.agreement import Writing, on_every_rank
from stagdist.training.engine.section_engine import SectionEngine
from stagdist.training.saving.background_write import BackgroundWrite
from stagdist.training.saving.engine_state import generator_states, optimizer_steps, stored_fragments
from stagdist.training.saving.host_copies import HostCopies

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

GIVE_UP_S = 5.0
"""How long an abandoned write may take to stop."""
VISIBLE_S = 5.0
"""How long a file of rank 0 may take to be visible on another host."""
TOKEN = ".token"
"""File that shows a save's folder to be the same on all ranks, and that no other run has replaced it."""


@dataclass(frozen=True)
class _Part:
    """What one rank has written: the record of its file, where its fragments are, its kinds and its generators.

    A rank whose partition is all padding writes no file.
    """

    file: str
    record: FileRecord | None
    owned: list[tuple[str, Fragment]]
    kinds: tuple[str, ...]
    generators: dict[str, str] | None


@dataclass(frozen=True)
class _Save:
    """A save whose file is being written in the folder `staged`, which is renamed to `final`."""

    staged: Path
    final: Path
    state: TrainingState
    part: _Part
    beside_training: bool
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
        self._written: BackgroundWrite | None = None
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
        written = self._written
        if self._under_way is None or written is None:
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
        staged = staging_folder(self._checkpoints) / checkpoint_name(state.step)
        state = replace(
            state, optimizer_steps=optimizer_steps(self._engine), loss_scaler=self._engine.loss_scaler_state()
        )
        token = [uuid4().hex]
        dist.broadcast_object_list(token, src=0, group=self._groups.control)
        with self._all_or_nothing():
            self._on_every_rank(lambda: _prepare(staged, token[0]))
            self._on_every_rank(lambda: _check_shared(staged, token[0]))
            part = self._on_every_rank(lambda: self._begin(staged, wait))
        final, paused_s = self._checkpoints / staged.name, time.perf_counter() - started
        self._under_way = _Save(staged, final, state, part, not wait, started, paused_s)
        if wait:
            self.finish()
        return final

    def _begin(self, staged: Path, wait: bool) -> _Part:
        """Begin to write this rank's file, from a copy in host memory if training continues meanwhile."""
        file, place = part_name(dist.get_rank()), self._groups.place
        fragments = stored_fragments(self._engine, self._groups, self._config.model, file)
        kinds = tuple(fragments[0].tensors) if fragments else ()
        generators = generator_states() if place.data == 0 else None
        self._written = BackgroundWrite(staged / file, fragments if wait else self._copies.copy(fragments))
        return _Part(file, None, [(one.name, one.place) for one in fragments], kinds, generators)

    def finish(self) -> None:
        """Wait for the files of the save under way, if any, and publish them as the newest checkpoint.

        Raises:
            CheckpointError: on every rank, when any rank could not write.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return
        assert self._written is not None
        with self._all_or_nothing():
            self._on_every_rank(self._written.check)  # no rank waits for files that will not be used
            part = replace(save.part, record=self._on_every_rank(self._written.record))
            parts = [part] * dist.get_world_size()
            dist.all_gather_object(parts, part, group=self._groups.control)
            self._on_every_rank(lambda: self._publish(save, parts))
        self._prune(save)
        total_s, note = time.perf_counter() - save.started, ""
        if save.beside_training:
            note = f", during training except for {save.paused_s:.2f} s"
        LOG.info("saved %s in %.1f s%s", save.final, total_s, note)

    def _publish(self, save: _Save, parts: list[_Part]) -> None:
        """Rank 0 writes what describes the parts, and gives the checkpoint its name."""
        if dist.get_rank() != 0:
            return
        specs = model_parameters(self._config.model)
        (save.staged / TOKEN).unlink()
        kinds = {part.kinds for part in parts if part.owned}
        index = index_of((entry for part in parts for entry in part.owned), specs, max(kinds))
        problem = f"their kinds are {kinds}" if len(kinds) > 1 else index.problem(specs)
        if problem:
            raise OSError(f"the ranks did not write the complete model: {problem}")
        state = replace(save.state, generators=tuple(p.generators for p in parts if p.generators is not None))
        records = {part.file: part.record for part in parts if part.record is not None}
        if checkpoint_files(save.staged) != sorted(records) or damage(save.staged, records, records, contents=False):
            raise OSError(f"{save.staged} does not hold what the ranks wrote; does another run save there?")
        complete(save.staged, self._config, state, index, records)
        publish(save.staged, save.final)

    def close(self) -> None:
        """Abandon the save under way: the run ends with an error that the other ranks may not have seen."""
        self._under_way = None
        if self._written is not None:
            self._written.give_up(GIVE_UP_S)
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
        if not save.beside_training:
            self._pruning.join()

    def _wait_for_earlier(self, step: int) -> None:
        if self._under_way is None:
            return
        started, earlier = time.perf_counter(), self._under_way.final.name
        self.finish()
        waited_s = time.perf_counter() - started
        LOG.info("the save of step %d waited %.1f s for that of %s", step, waited_s, earlier)

    def _on_every_rank(self, action: Callable[[], Result]) -> Result:
        return on_every_rank(self._groups.control, action, _failed)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Remove the files of the save when the block fails, as it then does on all ranks."""
        try:
            yield
        except CheckpointError:
            if self._written is not None:
                self._written.give_up(GIVE_UP_S)
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


def _prepare(staged: Path, token: str) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(staged.parent, ignore_errors=True)
        staged.mkdir(parents=True)
        (staged / TOKEN).write_text(token)


def _check_shared(staged: Path, token: str) -> None:
    """Check that the folder of rank 0 is visible here; otherwise the checkpoint would be spread over several disks."""
    deadline = time.monotonic() + VISIBLE_S
    while not ((staged / TOKEN).is_file() and (staged / TOKEN).read_text() == token):
        if time.monotonic() < deadline:
            time.sleep(0.1)
            continue
        raise OSError(f"{staged} is not what rank 0 sees; runs_directory must be on a file system all ranks share")


def _prune(checkpoints: Path, keep_last: int, newest: Path) -> None:
    """Remove old checkpoints. A failure is logged only: it costs space, not the run."""
    try:
        prune(checkpoints, keep_last, newest)
    except OSError as error:
        LOG.warning("an old checkpoint could not be removed: %s", error)
