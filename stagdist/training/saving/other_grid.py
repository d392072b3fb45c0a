"""Resuming on another grid: rank 0 makes a temporary copy of the checkpoint for this run's grid."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from stagdist.checkpoint.convert.staging import ConversionOptions, exclusive
from stagdist.checkpoint.convert.training_conversions import reshard
from stagdist.checkpoint.training.directory import read_state
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError, StagdistError
from stagdist.parallel.groups import Groups
from stagdist.telemetry.pulse import Phase, Pulse, beating
from stagdist.training.engine.agreement import shared, while_others_wait

LOG = logging.getLogger(__name__)

_LOCK = ".for-a-grid.lock"
"""Held in the folder of checkpoints by the run that converts one."""


@contextmanager
def on_this_grid(
    checkpoint: Path, config: RunConfig, groups: Groups, pulse: Pulse, *, trust_pickle: bool = False
) -> Iterator[Path]:
    """Yield the checkpoint for this run's grid: itself, or a copy that rank 0 makes and that is removed afterwards.

    Args:
        pulse: signs of life while it is converted.
        trust_pickle: read files that could run a program all the same.

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

    with held:  # removes the copy, also when loading fails
        try:
            while_others_wait(groups.control, convert, lambda: pulse.beat(Phase.START))
        except StagdistError as error:
            raise shared(CheckpointError(f"{checkpoint} could not be converted to this grid: {error}")) from error
        yield hidden / checkpoint.name
        dist.barrier(group=groups.control)


@contextmanager
def _converting(checkpoints: Path) -> Iterator[None]:
    """Hold the lock of temporary copies. Removes all copies, of killed runs first and this one at the end."""
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
    """Remove copies of a killed run when there is nothing to convert now; those in use stay."""
    if not any(checkpoints.glob(".for-*")):
        return
    try:
        with _converting(checkpoints):
            LOG.info("removed copies for another grid that a killed run had left in %s", checkpoints)
    except (CheckpointError, OSError) as error:
        LOG.warning("copies for another grid are left in %s: %s", checkpoints, error)
