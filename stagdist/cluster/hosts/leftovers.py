"""Finds the processes of a job on one host and kills them. Run on every host to clean up after an earlier start.

A process inherits the environment of its launcher, so a variable in it shows which job the process belongs to.
Names and command lines do not.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

JOB_VARIABLE = "STAGDIST_JOB"
"""Environment variable of every process of a supervised job: `HASH_OF_FOLDER.JOB`."""

NOT_SHARED = "is not there: the file system that all hosts share is not mounted"
VISIBLE_S = 3.0
"""Seconds until a network file system shows what another host has created."""

_POLL_S = 0.05


def job_processes(job: str) -> list[psutil.Process]:
    """Running processes of this host whose job is `job` or begins with `job.`, without this process."""
    return processes_with(JOB_VARIABLE, lambda value: value == job or value.startswith(f"{job}."))


def processes_with(variable: str, matches: Callable[[str], bool]) -> list[psutil.Process]:
    """Running processes of this host with a matching value of an environment variable, without this process."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        value = (process.info["environ"] or {}).get(variable)  # None for processes of other users
        alive = process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and value is not None and matches(value):
            found.append(process)
    return found


def kill_job(job: str, limit_s: float = 5.0) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Kill every process of a job; see `kill_all`."""
    return kill_all(lambda: job_processes(job), limit_s)


def kill_all(
    find: Callable[[], list[psutil.Process]], limit_s: float
) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Kill every process that `find` returns, and the processes they start meanwhile, until none is left.

    Returns: processes that were killed, and processes that still exist at the time limit.
    """
    killed: set[psutil.Process] = set()
    deadline = time.monotonic() + limit_s
    while (left := find()) and time.monotonic() < deadline:
        for process in left:
            killed.add(process)
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_POLL_S)
    return sorted(killed - set(left), key=lambda process: process.pid), left


def main() -> int:
    """`python -m stagdist.cluster.hosts.leftovers JOB [--end]`: JSON with the process ids `ended` and `left`.

    Exit code: 0, or 3 if this host lacks the path of --needs.
    """
    parser = argparse.ArgumentParser(prog="leftovers", description=__doc__)
    parser.add_argument("job", help="value of the variable, or its beginning")
    parser.add_argument("--end", action="store_true", help="kill the processes; without it they are only listed")
    parser.add_argument("--needs", type=Path, metavar="PATH", help="path that the host must have to be usable")
    arguments = parser.parse_args()
    ended, left = kill_job(arguments.job) if arguments.end else ([], job_processes(arguments.job))
    deadline = time.monotonic() + VISIBLE_S
    while arguments.needs is not None and not arguments.needs.exists():
        if time.monotonic() > deadline:
            print(f"{arguments.needs} {NOT_SHARED}", file=sys.stderr)
            return 3
        time.sleep(_POLL_S)
    print(json.dumps({"ended": [process.pid for process in ended], "left": [process.pid for process in left]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
