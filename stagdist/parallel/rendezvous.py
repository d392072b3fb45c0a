"""How the ranks of a world meet: torch's store, listening on the one address that the ranks were told."""

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from stagdist.errors import TransportError
from stagdist.parallel.device import on_cuda, require_hardware_queues
from stagdist.parallel.groups import WATCHDOG_GRACE_S


def join_world(
    device: str,
    timeout_s: float,
    *,
    start_timeout_s: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Make the default process group of the world that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Args:
        device: `cpu` (gloo) or `cuda:N` (nccl), which becomes this process's current device.
        timeout_s: of every operation of the group; NCCL's watchdog waits `WATCHDOG_GRACE_S` longer.
        start_timeout_s: for processes to come; `timeout_s` unless given.

    Raises:
        ConfigError: CUDA_DEVICE_MAX_CONNECTIONS is 1 on GPUs.
        TransportError: they did not meet.
    """
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    on_gpu = on_cuda(device)
    if on_gpu and size > 1:
        require_hardware_queues()
    if on_gpu:
        torch.cuda.set_device(device)  # before anything is made: collectives of objects use the current device
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=_store(environment, timedelta(seconds=start_timeout_s or timeout_s)),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s + (WATCHDOG_GRACE_S if on_gpu else 0.0)),
            device_id=torch.device(device) if on_gpu and size > 1 else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise TransportError(
            f"rank {rank}: the processes did not meet at {where} before step 0: {reason}; is the port free, is "
            "MASTER_ADDR an address of the first host, and did every process start?"
        ) from error


def _store(environment: Mapping[str, str], timeout: timedelta) -> dist.Store:
    """Left alone, torch listens on every interface of the first host; here rank 0 does on MASTER_ADDR alone.

    A store that torchrun keeps is used as it is.
    """
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=timeout))[0]
    if rank:
        return dist.TCPStore(address, port, size, is_master=False, timeout=timeout)
    listener = _listen(address, port)
    # The store owns the descriptor from here on.
    return dist.TCPStore(address, port, size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def _listen(address: str, port: int) -> socket.socket:
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener
