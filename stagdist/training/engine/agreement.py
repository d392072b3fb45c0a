"""Decisions that must be the same on all ranks: whether to update, to save, to stop."""

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from stagdist.config.parts import CheckpointConfig, TrainingConfig
from stagdist.errors import CheckpointError, StagdistError

Result = TypeVar("Result")

_MEETING_S = 0.5
"""Seconds between two broadcasts while rank 0 works and the others wait."""


class Writing(IntEnum):
    """State of a save that is written during training. The largest value of all ranks counts."""

    NONE = 0
    """Nothing is left to write."""
    RUNNING = 1
    FAILED = 2


@dataclass(frozen=True)
class Agreed:
    """The decision about one step, the same on every rank.

    Attributes:
        bad_ranks: ranks whose loss or gradients were not finite.
        signal_number: signal that some rank received, 0 for none.
        time_is_up: the wall-clock limit is reached.
        save_is_due: the time between two saves has passed.
        writing: state of the files of a save.
    """

    bad_ranks: Sequence[int]
    signal_number: int
    time_is_up: bool
    save_is_due: bool
    writing: Writing = Writing.NONE

    @property
    def stop(self) -> bool:
        """Whether the run must save and stop."""
        return bool(self.signal_number) or self.time_is_up


class StopSignals:
    """Remembers SIGTERM and SIGUSR1 until the next step boundary."""

    HANDLED = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0
        self._previous = {number: signal.signal(number, self._remember) for number in self.HANDLED}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def restore(self) -> None:
        """Put back the handlers from before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Agreement:
    """One small reduction per step over the control group, from which every rank reads the same decisions.

    Only rank 0 reads clocks, so that ranks cannot differ about the time.
    """

    def __init__(
        self,
        control: dist.ProcessGroup,
        signals: StopSignals,
        training: TrainingConfig,
        checkpoint: CheckpointConfig,
        started_at: float,
    ):
        self._control = control
        self._signals = signals
        self._rank = dist.get_rank()
        self._limit_s = None if training.max_minutes is None else training.max_minutes * 60
        self._save_every_s = None if checkpoint.interval_minutes is None else checkpoint.interval_minutes * 60
        self._started_at = started_at
        self._saved_at = time.monotonic()

    def saved(self) -> None:
        """Restart the time until the next save."""
        self._saved_at = time.monotonic()

    def agree(self, finite: bool, writing: Writing = Writing.NONE) -> Agreed:
        """Share this rank's state and return the common decision."""
        votes = torch.zeros(4 + dist.get_world_size(), dtype=torch.int64)
        votes[0] = self._signals.received
        if self._rank == 0:
            now = time.monotonic()
            votes[1] = self._limit_s is not None and now - self._started_at >= self._limit_s
            votes[2] = self._save_every_s is not None and now - self._saved_at >= self._save_every_s
        votes[3] = writing
        votes[4 + self._rank] = not finite
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._control)
        bad = torch.nonzero(votes[4:]).flatten().tolist()
        return Agreed(bad, int(votes[0]), bool(votes[1]), bool(votes[2]), Writing(int(votes[3])))


def first_problem(control: dist.ProcessGroup, problem: str | None) -> str | None:
    """The problem of the first rank that has one, the same on every rank; None if no rank has."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=control)
    return next((found for found in problems if found is not None), None)


def on_every_rank(
    control: dist.ProcessGroup, action: Callable[[], Result], explain: Callable[[str], StagdistError]
) -> Result:
    """Run `action` on every rank; if it fails on any, raise the same error on all.

    Only an OSError or our own error is shared. Any other error is a bug and is raised unchanged.

    Args:
        explain: makes the error from the message of the first failing rank.
    """
    failure: str | None = None
    result: Result | None = None
    try:
        result = action()
    except (OSError, StagdistError) as error:
        failure = f"rank {dist.get_rank()}: {_message(error)}"
    first = first_problem(control, failure)
    if first is not None:
        raise shared(explain(first))
    return cast(Result, result)  # set, because the action did not fail


def while_others_wait(control: dist.ProcessGroup, action: Callable[[], None], beat: Callable[[], None]) -> None:
    """Run `action` on rank 0. Meanwhile the ranks exchange small messages, so no collective reaches its time limit.

    Args:
        beat: gives a sign of life; called on the waiting ranks. The action gives its own.

    Raises:
        CheckpointError: on every rank, with the message of the OSError or of our own error.
    """
    outcome: list[Any] = [None]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(action) if dist.get_rank() == 0 else None
        while outcome[0] is None:
            if running is None:
                beat()
            else:
                wait([running], timeout=_MEETING_S)
                if running.done():
                    error = running.exception()
                    if error is not None and not isinstance(error, StagdistError | OSError):
                        raise error
                    outcome[0] = "" if error is None else _message(error)
            dist.broadcast_object_list(outcome, src=0, group=control)
    if outcome[0]:
        raise CheckpointError(outcome[0])


def _message(error: BaseException) -> str:
    """The error in words for the user."""
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def shared(error: StagdistError) -> StagdistError:
    """Mark an error that every rank raises."""
    error.everywhere = True
    return error
