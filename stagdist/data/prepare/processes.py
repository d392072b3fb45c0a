"""The processes that prepare a corpus: one process, or those that `mpirun` started.

Not for training: its ranks must not call MPI_Init, because a failed rank then waits in MPI_Finalize.
"""

import os
from typing import Any

from stagdist.errors import ConfigError

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Ranks:
    """The processes that prepare a corpus together; this class is for one process."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; also a barrier."""
        return [value]

    def abort(self) -> None:
        """Stop all other ranks after a failure on this one: they may be waiting for it."""


class MpiRanks(Ranks):
    """The ranks of `mpirun`."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise ConfigError(
                "mpirun started this, but mpi4py is not installed; pip install mpi4py, or start it without mpirun"
            ) from error
        self._world = MPI.COMM_WORLD
        self.rank = int(self._world.Get_rank())
        self.size = int(self._world.Get_size())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; also a barrier."""
        return list(self._world.allgather(value))

    def abort(self) -> None:
        """Stop all ranks."""
        self._world.Abort(2)


def current_ranks() -> Ranks:
    """The ranks of `mpirun` if it started this process, otherwise this process alone."""
    started = any(int(os.environ.get(name, "1")) > 1 for name in _SIZE_VARIABLES)
    return MpiRanks() if started else Ranks()
