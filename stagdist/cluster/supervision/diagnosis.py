"""Finds the fault of a supervised attempt from the reports of its ranks. Pure: no clock, no process."""

import re
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stagdist.cluster.supervision.rank_reports import RankReport
from stagdist.parallel.lost_peer_phrases import reports_lost_peer

FaultKind = Literal["exit", "stuck", "silent", "missing"]

_ERROR = "error: "

MISSED_S = 3.0
"""Seconds without a message that make a rank suspect when another lost its peer; agents send one each second."""

USER_ERROR_CODE = 2
"""Exit code of a script after a user error, where a restart cannot help."""


@dataclass(frozen=True)
class SilenceLimits:
    """How many seconds without a heartbeat are normal."""

    hang_s: float  # without a sign of life in the middle of work
    slow_s: float  # while starting, saving, exporting
    host_s: float  # without a message of an agent
    start_s: float = float("inf")  # before the first sign of life; infinite for scripts that give none


@dataclass(frozen=True)
class Fault:
    """Why an attempt cannot continue."""

    # `exit`: a rank ended; `stuck`: it sends no heartbeat; `silent`: its host or agent sends no messages; `missing`:
    # its agent could not be started
    kind: FaultKind
    rank: int | None  # the first to blame; None where no rank is
    host: str  # its host
    says: str  # one line for the user
    code: int | None = None  # exit code of the rank
    step: int = -1  # optimizer steps that were done
    own: bool = False  # the script ended by an error of its own, not by a signal or by the loss of a peer

    @property
    def same_again(self) -> tuple[object, ...]:
        """Equal for two faults that look the same, whatever rank was first and whatever numbers their text holds."""
        return (self.kind, self.step, self.code, re.sub(r"[\d.]+", "#", self.says.partition(": ")[2]))


def steps_done(ranks: Mapping[int, RankReport]) -> int:
    """Optimizer steps that all were seen to begin after; -1 while unknown."""
    return max((view.step for view in ranks.values()), default=-1)


def find_exit(ranks: Mapping[int, RankReport], now: float) -> Fault | None:
    """The first error of ranks that have ended: one that is no consequence of another, and the earliest."""
    failed = [view for view in ranks.values() if view.exit_code not in (None, 0) and not view.ended_by_us]
    if not failed:
        return None
    first = min(failed, key=lambda view: (is_consequence(view), not _explains(view), view.exited_at))
    stopped = _most_stuck([view for view in ranks.values() if view.exit_code is None and view.process in "TtD"])
    if is_consequence(first) and stopped is not None:
        return _stuck(stopped, 0.0, steps_done(ranks))
    if is_consequence(first) and (gone := _unheard(ranks, now, MISSED_S)):
        return _silent(gone, now, steps_done(ranks))
    says = f"rank {first.rank} on {first.host} {how_it_ended(first)}"
    own = (first.exit_code or 0) > 0 and not is_consequence(first)
    return Fault("exit", first.rank, first.host, says, first.exit_code, steps_done(ranks), own)


def is_consequence(view: RankReport) -> bool:
    """Whether a rank ended because of another one: it lost its peer, or was asked to end."""
    if view.exit_code == -signal.SIGABRT:  # NCCL's watchdog complains above the frames of its own stack
        return any(map(reports_lost_peer, view.tail))
    if view.exit_code is not None and view.exit_code < 0:
        return view.exit_code == -signal.SIGTERM
    return reports_lost_peer(error_line(view.tail))


def _explains(view: RankReport) -> bool:
    """Whether the rank reports why it ended. Only one rank reports an error that all ranks have in common."""
    return (view.exit_code or 0) < 0 or any(line.startswith(_ERROR) for line in view.tail)


def error_line(tail: Sequence[str]) -> str:
    """The line that says what went wrong: the last that begins with `error:`, else the last of all."""
    errors = [line for line in tail if line.startswith(_ERROR)]
    return (errors or list(tail) or ["it wrote nothing"])[-1].strip().removeprefix(_ERROR)


def how_it_ended(view: RankReport) -> str:
    """A rank's end in words."""
    assert view.exit_code is not None, "it has ended"
    if view.exit_code < 0:
        named = {number.value: number.name for number in signal.Signals}
        return f"was killed by {named.get(-view.exit_code, f'signal {-view.exit_code}')}"
    return f"ended with code {view.exit_code}: {error_line(view.tail)}"


def find_silence(ranks: Mapping[int, RankReport], now: float, limits: SilenceLimits) -> Fault | None:
    """A rank that is stuck, or a host that sends no messages."""
    if gone := _unheard(ranks, now, limits.host_s):
        return _silent(gone, now, steps_done(ranks))
    running = [view for view in ranks.values() if view.exit_code is None]
    if not any(_is_late(view, now, limits) for view in running):
        return None
    # Ranks that wait for the stuck one also stop sending heartbeats, some of them earlier.
    candidates = [view for view in running if view.silent_s(now) > min(2.0, limits.hang_s / 2)]
    worst = _most_stuck(candidates)
    assert worst is not None, "who is late is a candidate"
    return _stuck(worst, worst.silent_s(now), steps_done(ranks))


def _is_late(view: RankReport, now: float, limits: SilenceLimits) -> bool:
    if now - (view.stopped_at or now) > limits.hang_s:
        return True
    return view.silent_s(now) > (
        limits.start_s if not view.count else limits.slow_s if view.phase.slow else limits.hang_s
    )


def _unheard(ranks: Mapping[int, RankReport], now: float, limit_s: float) -> list[RankReport]:
    return [view for view in ranks.values() if view.exit_code is None and (view.lost or now - view.heard_at > limit_s)]


def _silent(views: Sequence[RankReport], now: float, step: int) -> Fault:
    ranks, host = ", ".join(str(view.rank) for view in views), views[0].host
    silence_s = now - max(view.heard_at for view in views)
    says = f"nothing was heard from rank {ranks} on {host} for {silence_s:.0f} s"
    if all(view.lost for view in views):
        says = f"the agent of rank {ranks} on {host} is gone"
    return Fault("silent", views[0].rank, host, says, step=step)


def _most_stuck(views: Collection[RankReport]) -> RankReport | None:
    def blame(view: RankReport) -> tuple[bool, bool, float]:
        return view.process in "TtD", not view.phase.waits, view.age_s - view.heard_at

    return max(views, key=blame, default=None)


def _stuck(view: RankReport, silent_s: float, step: int) -> Fault:
    state = {"T": "stopped", "t": "stopped by a debugger", "D": "stuck in the kernel", "R": "computing"}
    how = state.get(view.process, "waiting")
    silence = f", silent for {silent_s:.0f} s" if silent_s else ""
    says = f"rank {view.rank} on {view.host} is stuck in phase {view.phase.name.lower()} ({how}{silence})"
    return Fault("stuck", view.rank, view.host, says, step=step)
