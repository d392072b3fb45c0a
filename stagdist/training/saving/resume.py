"""Resuming: which checkpoint, and its content back into the engine."""

import logging
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from stagdist.checkpoint.complete import COMPLETE, OTHER_CONTENT, damage, read_complete
from stagdist.checkpoint.training.directory import (
    TrainingState,
    candidates,
    checkpoint_damage,
    coverage_damage,
    withdraw,
)
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError, OtherReleaseError
from stagdist.parallel.groups import Groups
from stagdist.training.engine.agreement import first_problem, on_every_rank, shared
from stagdist.training.engine.section_engine import SectionEngine
from stagdist.training.saving.engine_state import load_tensors, restore_generators

LOG = logging.getLogger(__name__)


def newest_complete(checkpoints: Path, groups: Groups) -> Path | None:
    """The newest checkpoint whose files match their records, the same on every rank; None in a new run.

    Every rank checks a share of the files. A damaged checkpoint is skipped with a warning and loses its marker.

    Raises:
        CheckpointError: there are checkpoints, but none is complete: starting over would lose the run's work without
            a word.
    """
    chosen: list[list[Path]] = [candidates(checkpoints) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(chosen, src=0, group=groups.control)
    for path in chosen[0]:
        reason = _shared_damage(path, groups)
        if reason is None:
            return path
        if dist.get_rank() == 0:
            LOG.warning("passing over %s: %s", path, reason)
        _require_confirmed(path, reason, groups)
        if dist.get_rank() == 0:
            with suppress(OSError):  # read-only: it is passed over at every start
                withdraw(path)
    if chosen[0]:
        raise shared(
            CheckpointError(
                f"none of the {len(chosen[0])} checkpoints in {checkpoints} is complete; restore one, or move the "
                "folder away to start from the beginning"
            )
        )
    return None


def _shared_damage(path: Path, groups: Groups) -> str | None:
    """The first reason why a rank cannot use a checkpoint, the same on every rank.

    Raises:
        OtherReleaseError: it is of a version of the format that this release does not read; on every rank.
    """
    reason = other = None
    try:
        if not (path / COMPLETE).is_file():
            reason = f"it has no {COMPLETE}: it was not written to the end, or was found damaged before"
        else:
            records = read_complete(path)
            mine = sorted(records)[dist.get_rank() :: dist.get_world_size()]
            reason = coverage_damage(path, records) or damage(path, mine, records)
    except OtherReleaseError as error:
        other = str(error)
    except (CheckpointError, OSError) as error:
        reason = str(error)
    if found := first_problem(groups.control, other):
        raise shared(OtherReleaseError(found))
    return first_problem(groups.control, reason)


def _require_confirmed(path: Path, reason: str, groups: Groups) -> None:
    """Check that a checkpoint is damaged for rank 0 too: another rank may only not see its files.

    Raises:
        CheckpointError: rank 0 sees all files that another rank lacks; on every rank.
    """
    unseen = None
    if dist.get_rank() == 0 and not reason.endswith(OTHER_CONTENT):
        with suppress(OSError):  # rank 0 cannot read it either
            intact = checkpoint_damage(path, contents=False) is None
            unseen = f"{path}: on one rank {reason}, but rank 0 sees all of it" if intact else None
    if found := first_problem(groups.control, unseen):
        raise shared(CheckpointError(f"{found}; runs_directory must be on a file system that all ranks share"))


def load_checkpoint(engine: SectionEngine, groups: Groups, model: ModelConfig, checkpoint: Path) -> TrainingState:
    """Fill the engine from a checkpoint that was found complete, whatever grid wrote it.

    Raises:
        CheckpointError: on every rank: a file does not hold what the index says.
    """

    def load() -> TrainingState:
        reader = TrainingReader(checkpoint)
        load_tensors(engine, groups, model, reader)
        return reader.state

    state = on_every_rank(groups.control, load, lambda reason: CheckpointError(f"{checkpoint}: {reason}"))
    engine.continue_from(state)
    restore_generators(state, groups)
    if state.grid != (groups.grid.pipe, groups.grid.data, groups.grid.tensor):
        LOG.info("%s was saved on pipe x data x tensor %dx%dx%d, this run has %s", checkpoint, *state.grid, groups.grid)
    return state
