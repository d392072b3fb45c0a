"""Start and end of the process groups for training."""

from collections.abc import Sequence
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from stagdist.parallel.device import choose_attention, use_deterministic_kernels
from stagdist.parallel.grid import Grid
from stagdist.parallel.groups import Groups, build_groups, set_default_timeout
from stagdist.parallel.world import join_world
from stagdist.training.engine.deepspeed_adapter import disable_shared_memory_op


def start_distributed(grid: Grid, device: str, timeout_s: float, *, deterministic: bool = False) -> Groups:
    """Join the world named by the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...) and build all groups.

    Args:
        deterministic: `training.deterministic`.

    Raises:
        TransportError: the ranks did not meet.
    """
    disable_shared_memory_op()
    set_default_timeout(timeout_s)
    choose_attention(training=True)
    if deterministic:
        use_deterministic_kernels()
    join_world(device, timeout_s)
    # DeepSpeed uses the default group that exists now.
    deepspeed.init_distributed(
        dist.get_backend(), timeout=timedelta(seconds=timeout_s), auto_mpi_discovery=False, verbose=False
    )
    groups = build_groups(grid, timeout_s)
    for rank in range(grid.world_size):
        theirs, ours = topology(grid).get_coord(rank), grid.coordinate(rank)
        same = (theirs.pipe, theirs.data, theirs.model) == (ours.pipe, ours.data, ours.tensor)
        assert same, f"rank {rank}: ours {ours}, DeepSpeed's {theirs}"
    return groups


def topology(grid: Grid) -> PipeModelDataParallelTopology:
    """The grid in DeepSpeed's terms."""
    return PipeModelDataParallelTopology(num_pp=grid.pipe, num_mp=grid.tensor, num_dp=grid.data)


def bring_to_first(
    control: dist.ProcessGroup, owner: int, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Send a rank's tensor to rank 0's CPU over the control group. Called on every rank.

    Args:
        owner: global rank that passes the tensor; the others may pass None.

    Returns:
        The tensor on rank 0 and on its owner; an empty one elsewhere.
    """
    if dist.get_rank() == owner:
        assert tensor is not None
        found = tensor.cpu().contiguous()
        if owner != 0:
            dist.send(found, 0, group=control)
        return found
    if dist.get_rank() == 0:
        found = torch.empty(tuple(shape), dtype=dtype)
        dist.recv(found, owner, group=control)
        return found
    return torch.empty(0)


def stop_distributed() -> None:
    """Destroy all process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
