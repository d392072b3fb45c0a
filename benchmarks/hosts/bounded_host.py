"""A core with its share of the memory bus, which stands for a host of its own on a machine where cores share one bus.

Every core has a neighbor: a process that reads memory without end, at a priority at which it runs only while the core
has nothing else to do. So every core reads all the time, and a process that is bound to one of them has no more than
its share of the bus at any time, also while the processes on the other cores wait or have no work.

`python -m benchmarks.hosts.bounded_host CORE` is the neighbor. It ends when its standard input ends.
"""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.common.conditions import ROOT
from benchmarks.decoding.site import DecodeSite, readers_of
from stagdist.errors import ConfigError, StagdistError

READ_BYTES = 1 << 28
"""Far more than any cache holds."""
READY = "reading"


class BoundedHost:
    """Binds this process to a core of its own; the core's neighbor reads while the block runs.

    Make it before threads are started: they inherit the core.

    Args:
        rank: of this process among those of the machine.
        ranks: their number.

    Attributes:
        core: number of the core.

    Raises:
        ConfigError: there are fewer cores than processes.
        StagdistError: the neighbor does not start or has ended too early.
    """

    def __init__(self, rank: int, ranks: int):
        self._cores = sorted(os.sched_getaffinity(0))
        if len(self._cores) < ranks:
            raise ConfigError(f"{ranks} processes need a core each, {len(self._cores)} may be used; start fewer")
        self.core = self._cores[rank]
        os.sched_setaffinity(0, {self.core})

    def __enter__(self) -> "BoundedHost":
        command = [sys.executable, "-m", "benchmarks.hosts.bounded_host", str(self.core)]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._neighbor = subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, text=True)
        assert self._neighbor.stdout is not None
        with self._neighbor.stdout as lines:
            if lines.readline().strip() != READY:
                self._end()
                raise StagdistError(f"no process could be started that reads beside core {self.core}")
        return self

    def __exit__(self, *error: object) -> None:
        code = self._neighbor.poll()
        self._end()
        if code is not None and error[0] is None:
            raise StagdistError(f"the process that reads beside core {self.core} ended too early, with code {code}")

    def _end(self) -> None:
        assert self._neighbor.stdin is not None
        self._neighbor.stdin.close()
        self._neighbor.wait()
        os.sched_setaffinity(0, self._cores)

    @contextmanager
    def beside(self, site: DecodeSite) -> Iterator[None]:
        """While the block runs, all ranks of a site have their neighbors, which do not count as other programs."""
        with self:
            site.beside_s = self.neighbor_s
            site.barrier()
            try:
                yield
            finally:
                site.beside_s = lambda: 0.0

    def neighbor_s(self) -> float:
        """Core seconds that the neighbor has read."""
        fields = Path(f"/proc/{self._neighbor.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_without_end(core: int) -> None:
    """Read memory on a core while it has nothing else to do, until standard input ends."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    *_, read = readers_of(torch.ones(READ_BYTES // 4))  # compiled, where there is a compiler
    read()
    print(READY, flush=True)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while not select.select([sys.stdin], [], [], 0)[0]:
        read()


if __name__ == "__main__":
    read_without_end(int(sys.argv[1]))
