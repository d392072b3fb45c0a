"""Finds the processes of a supervised run on this host and kills them.

A process inherits the environment of its parent, so a variable in it shows which run the process belongs to.
Names and command lines do not.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable

import psutil

JOB_VARIABLE = "STAGDIST_JOB"
"""Environment variable of every process of a supervised run: `HASH_OF_FOLDER.ATTEMPT`."""

SERVICE_LOG = "STAGDIST_SERVICE_LOG"
"""Variable of a rank: the file for the output of what outlives attempts, because the pipe of a rank does not."""

_SERVICE = "service"
_POLL_S = 0.05


def processes_with(variable: str, matches: Callable[[str], bool]) -> list[psutil.Process]:
    """Running processes of this host with a matching value of an environment variable, without this process."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        value = (process.info["environ"] or {}).get(variable)  # None for processes of other users
        alive = process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and value is not None and matches(value):
            found.append(process)
    return found


def service_mark(mark: str) -> str:
    """The mark of a process that serves clients while attempts end and begin, from that of an attempt."""
    return f"{mark.partition('.')[0]}.{_SERVICE}"


def end_earlier(run: str, mark: str = "", limit_s: float = 5.0, *, keep_service: bool = False) -> tuple[int, int]:
    """Kill what earlier attempts of a run have left on this host.

    Args:
        run: beginning of the marks of the run's processes.
        mark: of the present attempt, whose processes are spared.
        keep_service: spare what outlives attempts too.

    Returns: number of processes that were killed, and that still exist at the time limit.
    """
    spared = {mark, service_mark(run)} if keep_service else {mark}
    return kill_all(JOB_VARIABLE, lambda value: f"{value}.".startswith(f"{run}.") and value not in spared, limit_s)


def kill_group(leader: int) -> None:
    """Kill the process group that a process leads, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def kill_all(variable: str, matches: Callable[[str], bool], limit_s: float) -> tuple[int, int]:
    """Kill every process of `processes_with`, and the processes they start meanwhile, until none is left.

    Returns: number of processes that were killed, and that still exist at the time limit.
    """
    killed: set[psutil.Process] = set()
    deadline = time.monotonic() + limit_s
    while (left := processes_with(variable, matches)) and time.monotonic() < deadline:
        for process in left:
            killed.add(process)
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_POLL_S)
    return len(killed - set(left)), len(left)
