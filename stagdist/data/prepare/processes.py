"""The processes that prepare one corpus together: this one alone, or those that `mpirun` started.

Training never comes here: its ranks must not call MPI_Init, because a failed rank then waits in MPI_Finalize.
"""

import os
from collections.abc import Mapping
from typing import Any, Protocol

from stagdist.errors import ConfigError

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Ranks(Protocol):
    """What preparing a corpus needs of its processes."""

    rank: int
    size: int

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; also a barrier."""

    def abort(self) -> None:
        """End every rank after a failure on this one."""


class OneProcess:
    """No other process."""

    rank = 0
    size = 1

    def from_first(self, value: Any) -> Any:
        """The value itself."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value as the only one."""
        return [value]

    def abort(self) -> None:
        """Nothing to end."""


class MpiRanks:
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

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        return self._world.bcast(value, root=0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; also a barrier."""
        return list(self._world.allgather(value))

    def abort(self) -> None:
        """End every rank: the others may be waiting for this one."""
        self._world.Abort(2)


def current_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks of `mpirun` if it started this process, otherwise this process alone."""
    started = any(int(environment.get(name, "1")) > 1 for name in _SIZE_VARIABLES)
    return MpiRanks() if started else OneProcess()
