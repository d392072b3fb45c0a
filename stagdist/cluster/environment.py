"""What launchers tell a process through its environment, brought to one form."""

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from stagdist.cluster.exports import load_private
from stagdist.errors import ConfigError


@dataclass(frozen=True)
class World:
    """Place of this process among all.

    Attributes:
        rank: global, from 0.
        size: number of processes.
        local_rank: among the processes of this host.
        local_size: number of processes on this host.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int = 1

    def share_cores(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Give this process its share of the host's cores, unless OMP_NUM_THREADS says otherwise.

        Must run before torch is imported. Left alone, every process would start a thread for every core, and they
        would spend their time waiting for each other.
        """
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.local_size)))


_OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def join_launcher(environment: MutableMapping[str, str] = os.environ) -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, and complete the environment for torch.distributed.

    Open MPI's names are copied, so that MPI itself is never started: a rank stuck in its finalisation would keep a
    failed job alive. Without any launcher the process is a world of one on a free port. Variables of a private file
    (see `exports`) are read first.

    Raises:
        ConfigError: the variables contradict each other, or the private file cannot be used.
    """
    load_private(environment)
    if "RANK" not in environment and _OPEN_MPI["RANK"] in environment:
        environment.update({ours: environment[theirs] for ours, theirs in _OPEN_MPI.items() if theirs in environment})
        if "MASTER_ADDR" not in environment:
            raise ConfigError(
                "Open MPI started this process, but MASTER_ADDR is not set; put MASTER_ADDR=<first host> and "
                "MASTER_PORT=<free port> into .deepspeed_env, or pass --master_addr to deepspeed"
            )
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    environment.setdefault("MASTER_PORT", "29500")
    try:
        # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
        local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
        rank, size, local_rank = (int(environment[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        world = World(rank, size, local_rank, int(local_size))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers set together by a launcher: {error}"
        ) from None
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"RANK {world.rank} is not below WORLD_SIZE {world.size}; check the launcher's environment")
    return world


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
