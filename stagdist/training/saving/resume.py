"""Resuming: which checkpoint, and its content back into the engine."""

import logging
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.serialization import safe_globals

from stagdist.checkpoint.complete import COMPLETE, damage, read_complete
from stagdist.checkpoint.convert.staging import put_back
from stagdist.checkpoint.training.directory import TrainingState, candidates, coverage_damage, read_state, withdraw
from stagdist.checkpoint.training.pickles import ENUM_MEMBER, refusal
from stagdist.checkpoint.training.stage_files import tensor_files
from stagdist.checkpoint.training.training_reader import TrainingReader
from stagdist.config.parts import OptimizerConfig
from stagdist.errors import CheckpointError, ConfigError, StagdistError
from stagdist.parallel.groups import Groups
from stagdist.training.engine.agreement import first_problem, shared, while_others_wait
from stagdist.training.engine.deepspeed_adapter import FILE_CLASSES, FileReader
from stagdist.training.engine.section_engine import SectionEngine

LOG = logging.getLogger(__name__)


def newest_complete(checkpoints: Path, groups: Groups) -> Path | None:
    """The newest checkpoint whose files match their records, the same on every rank; None in a new run.

    Every rank checks a share of the files. A damaged checkpoint is skipped with a warning and loses its marker.

    Raises:
        CheckpointError: there are checkpoints, but none is complete: starting over would lose the run's work without
            a word; or a conversion is replacing one now.
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
                f"none of the {len(chosen[0])} checkpoints in {checkpoints} is complete; restore one, or move the "
                "folder away to start from the beginning"
            )
        )
    return None


def _put_back(checkpoints: Path, groups: Groups) -> None:
    """Undo the renaming by a conversion that was killed while it replaced a checkpoint; rank 0 renames."""

    def rename() -> None:
        for path in put_back(checkpoints):
            LOG.warning("restored %s: a conversion was killed while it replaced it", path)

    try:
        while_others_wait(groups.control, rename, lambda: None)  # takes no time
    except CheckpointError as error:
        raise shared(error) from error


def _shared_damage(path: Path, groups: Groups) -> str | None:
    try:
        if not (path / COMPLETE).is_file():
            reason: str | None = f"it has no {COMPLETE}: it was not written to the end, or was found damaged before"
        else:
            records = read_complete(path)
            mine = sorted(records)[dist.get_rank() :: dist.get_world_size()]
            reason = coverage_damage(path, records) or damage(path, mine, records)
    except CheckpointError as error:
        reason = str(error)
    except ConfigError as error:
        raise shared(ConfigError(f"{path}: {error}")) from error
    return first_problem(groups.control, reason)


def load_checkpoint(
    engine: SectionEngine, checkpoint: Path, optimizer: OptimizerConfig, *, trust_pickle: bool = False
) -> TrainingState:
    """Fill the engine from a checkpoint that was found complete and is of this grid.

    Args:
        optimizer: its settings replace those that DeepSpeed saved.
        trust_pickle: read files that could run a program all the same.

    Raises:
        CheckpointError: on every rank: DeepSpeed finds nothing in it, or a file could run a program and is not
            trusted, or is not what DeepSpeed writes.
    """
    if not trust_pickle:
        _check_readable(checkpoint, engine)
    client_state = engine.read_files(
        FileReader(partial(load_checkpoint_file, trust_pickle=trust_pickle)), checkpoint, optimizer
    )
    if client_state is None:
        raise shared(CheckpointError(f"DeepSpeed found nothing to load in {checkpoint}"))
    torch.set_rng_state(client_state["cpu_random_state"])
    if torch.cuda.is_available() and "cuda_random_state" in client_state:
        torch.cuda.set_rng_state(client_state["cuda_random_state"])
    return read_state(checkpoint)


def load_checkpoint_file(path: str, map_location: Any = None, *, trust_pickle: bool = False) -> Any:
    """Read one file for DeepSpeed. Refuses what could run a program: a checkpoint may come from anywhere.

    Args:
        trust_pickle: read such files all the same, and run what they contain.

    Raises:
        CheckpointError: it asks for more than tensors, plain containers and DeepSpeed's own few types.
    """
    if trust_pickle:
        return torch.load(path, map_location=map_location, weights_only=False)
    try:
        with safe_globals([ENUM_MEMBER, *FILE_CLASSES]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(refusal(Path(path), error)) from error


def _check_readable(checkpoint: Path, engine: SectionEngine) -> None:
    """Open the files, a share on every rank, before DeepSpeed loads them together: there, one refusal would hang.

    Raises:
        CheckpointError: on every rank, about the first file that is refused.
    """
    problem: str | None = None
    try:
        reader = TrainingReader(checkpoint)
        names = sorted(tensor_files(reader.model, reader.state.grid, bf16=reader.bf16))
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            reader.file(name)
    except StagdistError as error:
        problem = str(error)
    first = first_problem(engine.control, problem)
    if first is not None:
        raise shared(CheckpointError(first))
