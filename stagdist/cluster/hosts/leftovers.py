"""Which processes of a host belong to a job: those whose environment holds its mark. Run on hosts to end what is left.

Names and command lines say nothing about who started a process; its environment, inherited from its launcher, does.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MARK = "STAGDIST_JOB"
"""Variable that marks every process of a supervised job, as `folder's hash.job`."""

NOT_THERE = "is not there: the file system that all hosts share is not mounted"
APPEARS_S = 3.0
"""Seconds in which a network file system shows what another host has just made."""

_PAUSE_S = 0.05


@dataclass(frozen=True)
class Marked:
    """A process of a job.

    Attributes:
        pid: its number.
        born: start time in clock ticks since boot, so that a number used again is not taken for it.
        command: its command line, for people.
    """

    pid: int
    born: int
    command: str


def marked(mark: str, proc: Path = Path("/proc")) -> list[Marked]:
    """Living processes of this host whose mark is `mark` or begins with `mark.`, without this process."""
    return carrying(MARK, lambda own: own == mark or own.startswith(f"{mark}."), proc)


def carrying(variable: str, belongs: Callable[[str], bool], proc: Path = Path("/proc")) -> list[Marked]:
    """Living processes of this host with a variable whose value `belongs`, without this process."""
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile, or is not ours
            entries = (folder / "environ").read_bytes().split(b"\0")
            start = f"{variable}=".encode()
            values = [entry.removeprefix(start).decode() for entry in entries if entry.startswith(start)]
            if not any(map(belongs, values)):
                continue
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if fields[0] != "Z":
                found.append(Marked(int(folder.name), int(fields[19]), command))
    return found


def end_marked(mark: str, limit_s: float = 5.0) -> tuple[list[Marked], list[Marked]]:
    """Kill every process of the job; see `end_all`."""
    return end_all(lambda: marked(mark), limit_s)


def end_all(find: Callable[[], list[Marked]], limit_s: float) -> tuple[list[Marked], list[Marked]]:
    """Kill every process that `find` finds, and what they start meanwhile, until none is left.

    Returns: those that were killed, and those that could not be ended in time.
    """
    ended: dict[tuple[int, int], Marked] = {}
    deadline = time.monotonic() + limit_s
    while (left := find()) and time.monotonic() < deadline:
        for process in left:
            ended[process.pid, process.born] = process
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)
    remaining = {(process.pid, process.born) for process in left}
    return [process for key, process in ended.items() if key not in remaining], left


def main() -> int:
    """`python -m stagdist.cluster.hosts.leftovers MARK [--end]`: JSON with the processes `ended` and `left`.

    Exit code: 0, or 3 where this host does not see what it needs.
    """
    parser = argparse.ArgumentParser(prog="marks", description=__doc__)
    parser.add_argument("mark", help="mark of a job")
    parser.add_argument("--end", action="store_true", help="kill them; otherwise they are listed alone")
    parser.add_argument("--needs", type=Path, metavar="PATH", help="that must be there if the host is to be used")
    arguments = parser.parse_args()
    ended, left = end_marked(arguments.mark) if arguments.end else ([], marked(arguments.mark))
    deadline = time.monotonic() + APPEARS_S
    while arguments.needs is not None and not arguments.needs.exists():
        if time.monotonic() > deadline:
            print(f"{arguments.needs} {NOT_THERE}", file=sys.stderr)
            return 3
        time.sleep(_PAUSE_S)
    print(json.dumps({"ended": [vars(process) for process in ended], "left": [vars(process) for process in left]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
