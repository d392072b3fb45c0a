"""What launchers tell a process through its environment, brought to one form."""

import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from stagdist.errors import ConfigError
from stagdist.parallel.private_variables import load_private

OTHERS_WAIT_S = 3.0
"""Seconds before a rank that is not the first of its host prints an error that others may have met as well."""


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
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_MASTER_REMEDY = {
    "Open MPI": "write .deepspeed_env with launch/doctor.py --write-env, MASTER_ADDR and MASTER_PORT set in the shell",
    "srun": "export MASTER_ADDR=<first host> before srun, as launch/slurm/pretrain.sbatch does",
}


def join_launcher(environment: MutableMapping[str, str] = os.environ) -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, and complete the environment for torch.distributed.

    The names of Open MPI and of Slurm's srun are copied; MPI itself is never started, because a rank stuck in its
    finalisation would keep a failed job alive. Without any launcher the process is a world of one on a free port.
    Variables of a private file (see `exports`) are read first. Where the own host name means a loopback address, the
    interface that gloo listens on is named.

    Raises:
        ConfigError: the variables contradict each other, or the private file cannot be used.
    """
    load_private(environment)
    if "RANK" not in environment:
        _translate(environment)
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
    if world.size > world.local_size:
        name_interface(environment)
    return world


def _translate(environment: MutableMapping[str, str]) -> None:
    """Give the variables of Open MPI and srun their usual names."""
    # A batch script of Slurm has SLURM_PROCID too, but only srun starts steps: without one nobody else would come.
    in_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    for launcher, names in (("Open MPI", _OPEN_MPI), ("srun", {} if in_batch_script else _SLURM)):
        if names and names["RANK"] in environment:
            environment.update({ours: environment[theirs] for ours, theirs in names.items() if theirs in environment})
            if launcher == "srun":
                environment.setdefault("LOCAL_WORLD_SIZE", _tasks_here(environment))
            if "MASTER_ADDR" not in environment:
                raise ConfigError(
                    f"{launcher} started this process, but MASTER_ADDR is not set; {_MASTER_REMEDY[launcher]}"
                )
            return


def _tasks_here(environment: MutableMapping[str, str]) -> str:
    """Tasks of this step on this host, from a list such as `8(x3),4`: eight on each of three hosts, then four."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    counts: list[str] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected something like 8(x3),4")
        counts += [match[1]] * int(match[2] or 1)
    host = environment.get("SLURM_NODEID", "0")
    return counts[int(host)] if host.isdigit() and int(host) < len(counts) else counts[0]


def name_interface(environment: MutableMapping[str, str], routes: Path = Path("/proc/net/route")) -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is, on a host whose own name means a loopback address.

    Gloo tells the others to find it where its host name points. Debian's installer points it at 127.0.1.1.

    Raises:
        ConfigError: which interface the other hosts are on cannot be told.
    """
    first = environment.get("MASTER_ADDR", "localhost")
    alone = first == "localhost" or first.startswith("127.")
    if alone or "GLOO_SOCKET_IFNAME" in environment or not _is_loopback(socket.gethostname()):
        return
    interfaces = _interfaces(first, routes)
    if len(interfaces) != 1:
        raise ConfigError(
            f"the host name {socket.gethostname()} means a loopback address, and of the interfaces "
            f"{', '.join(sorted(interfaces)) or '(none)'} none can be told to lead to the other hosts; set "
            "GLOO_SOCKET_IFNAME to the right one"
        )
    environment["GLOO_SOCKET_IFNAME"] = interfaces.pop()


def _interfaces(first: str, routes: Path) -> set[str]:
    """The interface that leads to the first host; all there are, if its name means a loopback address here."""
    network = [line.split() for line in routes.read_text().splitlines()[1:]]
    # Addresses are hexadecimal, lowest byte first.
    known = [(row[0], int(row[1], 16), int(row[7], 16)) for row in network]
    if _is_loopback(first):
        return {name for name, _, _ in known}
    wanted = int.from_bytes(socket.inet_aton(socket.gethostbyname(first)), "little")
    fitting = [(bin(mask).count("1"), name) for name, destination, mask in known if wanted & mask == destination]
    return {name for bits, name in fitting if bits == max(fitting)[0]}


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True  # gloo, too, takes loopback where the name means nothing


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
