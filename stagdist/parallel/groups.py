"""Process groups: one for each set of ranks that communicates, all with a time limit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from stagdist.errors import ConfigError
from stagdist.parallel.device import on_cuda
from stagdist.parallel.grid import Coordinate, Grid

WATCHDOG_GRACE_S = 60.0
"""Seconds that NCCL's watchdog waits longer than the host.

The watchdog aborts the process. The deadline of the host raises an error that names stage, peer and step, so it must
come first.
"""


@dataclass(frozen=True)
class Groups:
    """The groups this rank belongs to.

    Attributes:
        grid: sizes of the axes.
        place: coordinate of this rank.
        tensor: ranks that split the same matrices.
        control: all ranks over gloo, for host-side agreements that must not touch the device's queue.
        by_ranks: the groups that `group_of` has returned, by their sorted global ranks.
    """

    grid: Grid
    place: Coordinate
    tensor: dist.ProcessGroup
    control: dist.ProcessGroup
    by_ranks: dict[tuple[int, ...], dist.ProcessGroup] = field(repr=False)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside, `torch.distributed.new_group` returns the existing group of the same ranks, if there is one.

        DeepSpeed asks for six groups or more, several of them of the same ranks. On nccl each would be a communicator
        with a stream and buffers. Sharing one is safe: all ranks launch DeepSpeed's collectives in the same order.
        """
        original = dist.new_group
        dist.new_group = partial(group_of, by_ranks=self.by_ranks)  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.new_group = original


def group_of(ranks: Iterable[int], by_ranks: dict[tuple[int, ...], dist.ProcessGroup]) -> dist.ProcessGroup:
    """The one group of some ranks, made at the first request; called on every rank of the world.

    Returns:
        The group; on a rank outside of it what `torch.distributed.new_group` returns there.
    """
    key = tuple(sorted(ranks))
    if key not in by_ranks:
        by_ranks[key] = c10d.new_group(list(key))
    return by_ranks[key]


def set_default_timeout(timeout_s: float) -> None:
    """Set the limit of every group made from now on, also of those that DeepSpeed makes.

    Its `new_group` calls pass no limit and would otherwise wait torch's 10 or 30 minutes for a frozen peer.
    """
    c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_s + WATCHDOG_GRACE_S)


def build_groups(grid: Grid, timeout_s: float) -> Groups:
    """Make the tensor and control groups; the default group exists already.

    Raises:
        ConfigError: the world is not as large as the grid.
    """
    if dist.get_world_size() != grid.world_size:
        raise ConfigError(f"the grid {grid} needs {grid.world_size} ranks, but {dist.get_world_size()} were started")
    rank = dist.get_rank()
    world = dist.group.WORLD
    assert world is not None, "the default group exists"
    by_ranks = {tuple(range(grid.world_size)): world}
    tensor = [group_of(ranks, by_ranks) for ranks in grid.tensor_groups()][rank // grid.tensor]
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Groups(grid, grid.coordinate(rank), tensor, control, by_ranks)


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
        dist.destroy_process_group()
