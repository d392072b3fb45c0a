"""The world of processes: read the launcher's variables, choose the device of this rank, and join the other ranks.

Importing this module does not import torch. Launch scripts call `join_launcher` and `World.share_cores` first, because
torch reads OMP_NUM_THREADS when it is imported; the functions that need torch import it themselves.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from stagdist.config.cross_checks import device_problem
from stagdist.errors import ConfigError, TransportError
from stagdist.parallel.private_variables import load_private

if TYPE_CHECKING:
    import torch.distributed as dist

WATCHDOG_GRACE_S = 60.0
"""Seconds that NCCL's watchdog waits longer than the host.

The watchdog aborts the process. The host's deadline raises an error that names stage, peer and step, so it must expire
first.
"""

HARDWARE_QUEUES = 32
"""Streams of a process that the GPU can run concurrently. The driver's default is 8."""

_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


@dataclass(frozen=True)
class World:
    """Position of this process among all processes of the run.

    Attributes:
        rank: global rank, from 0.
        size: number of processes.
        local_rank: rank among the processes of this host.
        local_size: number of processes on this host.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int = 1

    def share_cores(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Set OMP_NUM_THREADS, if it is not set, to an equal share of the host's cores. Call before importing torch.

        By default every process would start one thread per core, and the threads would compete for the cores.
        """
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.local_size)))


# ---- the launcher's variables ----

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

    The variables of a private file are loaded first. The names that Open MPI and Slurm's srun use are copied to the
    common ones. MPI itself is never initialized, because a rank that hangs in its finalization would keep a failed job
    alive. Without a launcher the process is a world of one. On a host whose own name resolves to a loopback address,
    GLOO_SOCKET_IFNAME is set.

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
        # torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
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
    """Copy the variables of Open MPI or srun to their common names."""
    # A Slurm batch script has SLURM_PROCID too, but only srun starts several processes.
    in_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    for launcher, names in (("Open MPI", _OPEN_MPI), ("srun", {} if in_batch_script else _SLURM)):
        if names and names["RANK"] in environment:
            environment.update({ours: environment[theirs] for ours, theirs in names.items() if theirs in environment})
            if launcher == "srun":
                environment.setdefault("LOCAL_WORLD_SIZE", _tasks_on_this_host(environment))
            if "MASTER_ADDR" not in environment:
                raise ConfigError(
                    f"{launcher} started this process, but MASTER_ADDR is not set; {_MASTER_REMEDY[launcher]}"
                )
            return


def _tasks_on_this_host(environment: MutableMapping[str, str]) -> str:
    """Tasks of this step on this host, from a list such as `8(x3),4`: eight on each of three hosts, then four."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    counts: list[str] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected a list such as 8(x3),4")
        counts += [match[1]] * int(match[2] or 1)
    host = environment.get("SLURM_NODEID", "0")
    return counts[int(host)] if host.isdigit() and int(host) < len(counts) else counts[0]


def name_interface(environment: MutableMapping[str, str], routes: Path = Path("/proc/net/route")) -> None:
    """Set GLOO_SOCKET_IFNAME if it is not set and the host's own name resolves to a loopback address.

    Gloo publishes the address that the host name resolves to. Debian's installer maps it to 127.0.1.1.

    Raises:
        ConfigError: the interface that leads to the other hosts cannot be determined.
    """
    first = environment.get("MASTER_ADDR", "localhost")
    one_host = first == "localhost" or first.startswith("127.")
    if one_host or "GLOO_SOCKET_IFNAME" in environment or not _is_loopback(socket.gethostname()):
        return
    interfaces = _interfaces(first, routes)
    if len(interfaces) != 1:
        raise ConfigError(
            f"the host name {socket.gethostname()} resolves to a loopback address, and it is not clear which of the "
            f"interfaces {', '.join(sorted(interfaces)) or '(none)'} leads to the other hosts; set GLOO_SOCKET_IFNAME "
            "to the right one"
        )
    environment["GLOO_SOCKET_IFNAME"] = interfaces.pop()


def _interfaces(first: str, routes: Path) -> set[str]:
    """The interface that leads to the first host, or all interfaces if its name resolves to a loopback address here."""
    network = [line.split() for line in routes.read_text().splitlines()[1:]]
    # Addresses are hexadecimal, lowest byte first.
    table = [(row[0], int(row[1], 16), int(row[7], 16)) for row in network]
    if _is_loopback(first):
        return {name for name, _, _ in table}
    target = int.from_bytes(socket.inet_aton(socket.gethostbyname(first)), "little")
    matches = [(bin(mask).count("1"), name) for name, destination, mask in table if target & mask == destination]
    return {name for bits, name in matches if bits == max(matches)[0]}


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True  # gloo falls back to loopback for a name that does not resolve


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


# ---- the device of this rank ----


def choose_device(choice: str, local_rank: int = 0, *, option: str = "--device") -> str:
    """`cpu` or `cuda:N`.

    `auto` and `cuda` give each rank of a host its own device. `cuda:N` names one device, which several ranks may share.
    NCCL allows sharing for trials only (`NCCL_MULTI_RANK_GPU_ENABLE=1`, NCCL 2.30 or newer).

    Args:
        choice: `auto`, `cpu`, `cuda` or `cuda:N`.
        option: name of the option or configuration key, for error messages.

    Raises:
        ConfigError: the choice is invalid, the device does not exist, or the host has more ranks than devices.
    """
    if problem := device_problem(choice, option):
        raise ConfigError(problem)
    if choice == "cpu":
        return "cpu"
    import torch

    os.environ.setdefault(_QUEUES, str(HARDWARE_QUEUES))  # the driver reads it when CUDA is initialized
    if not torch.cuda.is_available():
        if choice == "auto":
            return "cpu"
        raise ConfigError(f"{option} is {choice}, but torch sees no CUDA device; use auto or cpu")
    count = torch.cuda.device_count()
    if ":" in choice:
        index = int(choice.partition(":")[2])
        if index >= count:
            raise ConfigError(f"{option} is {choice}, but torch sees {count} CUDA devices, cuda:0 to cuda:{count - 1}")
        return f"cuda:{index}"
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no device of its own, torch sees {count}; start at most {count} processes on "
            f"this host (slots in a hostfile), or set {option} to cpu"
        )
    return f"cuda:{local_rank}"


# ---- joining the other ranks ----


def join_world(
    device: str,
    timeout_s: float,
    *,
    start_timeout_s: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Create the default process group of the world in the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    A world of one opens no sockets.

    Args:
        device: `cpu` (gloo) or `cuda:N` (nccl), which becomes this process's current device.
        timeout_s: limit of every operation of the group; NCCL's watchdog waits `WATCHDOG_GRACE_S` longer.
        start_timeout_s: limit for all processes to join; `timeout_s` unless given.

    Raises:
        ConfigError: CUDA_DEVICE_MAX_CONNECTIONS is 1 on GPUs.
        TransportError: the processes did not meet.
    """
    import torch
    import torch.distributed as dist

    rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    on_gpu = device.startswith("cuda")
    if on_gpu and size > 1:
        _require_hardware_queues()
    if on_gpu:
        torch.cuda.set_device(device)  # collectives of objects use the current device
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",  # gloo accepts GPU tensors too, but copies them through the host
            store=_store(rank, size, environment, timedelta(seconds=start_timeout_s or timeout_s)),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s + (WATCHDOG_GRACE_S if on_gpu else 0.0)),
            device_id=torch.device(device) if on_gpu and size > 1 else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        where = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        raise TransportError(
            f"rank {rank}: the processes did not meet at {where} before step 0: {reason}; is the port free, is "
            "MASTER_ADDR an address of the first host, and did every process start?"
        ) from error


def _require_hardware_queues() -> None:
    if os.environ.get(_QUEUES, "").strip() == "1":
        raise ConfigError(
            f"{_QUEUES} is 1 (Megatron-LM's scripts set this). With one hardware queue, a pending receive blocks every "
            "later kernel, including the send that its peer needs, so ranks would deadlock. Unset it (stagdist then "
            f"uses {HARDWARE_QUEUES})"
        )


def _store(rank: int, size: int, environment: Mapping[str, str], timeout: timedelta) -> "dist.Store":
    """torch's store. Rank 0 listens on MASTER_ADDR only; torch's default listens on every interface of the host.

    Under torchrun the store of its agent is used.
    """
    import torch.distributed as dist

    if size == 1:
        return dist.HashStore()
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=timeout))[0]
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank:
        return dist.TCPStore(address, port, size, is_master=False, timeout=timeout)
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((address, port), family=family, backlog=4096)
    # The store owns the descriptor from here on.
    return dist.TCPStore(address, port, size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())
