"""Process groups: made once, all with a time limit, in one rank order for DeepSpeed and megatron-core."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from stagdist.errors import ConfigError
from stagdist.parallel.device import on_cuda
from stagdist.parallel.grid import Coordinate, Grid
from stagdist.parallel.megatron_core import parallel_state


@dataclass(frozen=True)
class Groups:
    """The groups this rank belongs to.

    Attributes:
        grid: sizes of the axes.
        place: coordinate of this rank.
        tensor: ranks that split the same matrices.
        control: all ranks over gloo, for host-side agreements that must not touch the device's queue.
    """

    grid: Grid
    place: Coordinate
    tensor: dist.ProcessGroup
    control: dist.ProcessGroup


def set_default_timeout(timeout_s: float) -> None:
    """Give every group made from now on this limit, also those that DeepSpeed and megatron-core make.

    Their `new_group` calls pass no limit and would otherwise wait torch's 10 or 30 minutes for a frozen peer.
    """
    limit = timedelta(seconds=timeout_s)
    c10d.default_pg_timeout = limit
    c10d.default_pg_nccl_timeout = limit


def build_groups(grid: Grid, timeout_s: float) -> Groups:
    """Make the tensor and control groups; the default group exists already.

    Raises:
        ConfigError: the world is not as large as the grid.
    """
    if dist.get_world_size() != grid.world_size:
        raise ConfigError(f"the grid {grid} needs {grid.world_size} ranks, but {dist.get_world_size()} were started")
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipe,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_s / 60,
    )
    _check_rank_order(grid, rank)
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Groups(grid, grid.coordinate(rank), parallel_state.get_tensor_model_parallel_group(), control)


def _check_rank_order(grid: Grid, rank: int) -> None:
    """megatron-core must see this rank where our grid sees it."""
    place = grid.coordinate(rank)
    expected = {
        "tensor": (grid.tensor_groups(), parallel_state.get_tensor_model_parallel_group()),
        "data": (grid.data_groups(), parallel_state.get_data_parallel_group()),
        "pipe": (grid.pipe_groups(), parallel_state.get_pipeline_model_parallel_group()),
    }
    for axis, (groups, group) in expected.items():
        ours = next(ranks for ranks in groups if rank in ranks)
        theirs = dist.get_process_group_ranks(group)
        assert ours == theirs, f"{axis} group of rank {rank} at {place}: ours {ours}, megatron-core's {theirs}"


def destroy_groups() -> None:
    """Forget megatron-core's groups; the default group stays."""
    parallel_state.destroy_model_parallel()


@contextmanager
def single_process(timeout_s: float = 600.0, device: str = "cpu") -> Iterator[Groups]:
    """A world of one rank without sockets, for tools that run the model in one process.

    Args:
        device: `cpu` (gloo) or `cuda:N` (nccl), which becomes this process's current device.
    """
    set_default_timeout(timeout_s)
    if on_cuda(device):
        torch.cuda.set_device(device)
    # gloo takes tensors of a GPU too, but copies them to the host and back.
    dist.init_process_group("nccl" if on_cuda(device) else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield build_groups(Grid(1, 1, 1), timeout_s)
    finally:
        destroy_groups()
        dist.destroy_process_group()
