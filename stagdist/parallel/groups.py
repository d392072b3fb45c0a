"""Process groups: one for each set of ranks that communicates, all with a time limit."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from stagdist.errors import ConfigError
from stagdist.parallel.grid import Coordinate, Grid
from stagdist.parallel.world import WATCHDOG_GRACE_S, join_world


@dataclass(frozen=True)
class Groups:
    """The groups this rank belongs to.

    Attributes:
        place: coordinate of this rank.
        tensor: ranks that split the same matrices.
        control: all ranks over gloo, for agreements between hosts that must not use the device's queue.
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

        DeepSpeed creates at least six groups, several of them of the same ranks. With nccl each would be a communicator
        with its own stream and buffers. Sharing is safe: all ranks launch DeepSpeed's collectives in the same order.
        """
        original = dist.new_group
        dist.new_group = partial(group_of, by_ranks=self.by_ranks)  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.new_group = original


def group_of(ranks: Iterable[int], by_ranks: dict[tuple[int, ...], dist.ProcessGroup]) -> dist.ProcessGroup:
    """The one group of a set of ranks, created at the first request. Called on every rank of the world.

    Returns:
        The group; on other ranks, what `torch.distributed.new_group` returns there.
    """
    key = tuple(sorted(ranks))
    if key not in by_ranks:
        by_ranks[key] = c10d.new_group(list(key))
    return by_ranks[key]


def set_default_timeout(timeout_s: float) -> None:
    """Set the time limit of every group created from now on, including DeepSpeed's.

    DeepSpeed's `new_group` calls pass no limit; they would wait torch's default of 10 or 30 minutes for a frozen peer.
    """
    c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_s + WATCHDOG_GRACE_S)


def build_groups(grid: Grid, timeout_s: float) -> Groups:
    """Create the tensor and control groups; the default group exists already.

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
def world_groups(
    tensor_size: int, device: str, timeout_s: float, environment: Mapping[str, str] = os.environ
) -> Iterator[Groups]:
    """Join the world of the environment and build its groups, without pipeline stages; leave the world at the end.

    Args:
        tensor_size: size of the tensor axis; the data axis takes the remaining ranks.
        device: as for `join_world`.

    Raises:
        TransportError: the processes did not meet.
    """
    set_default_timeout(timeout_s)
    join_world(device, timeout_s, environment=environment)
    size = dist.get_world_size()
    failed = True
    try:
        yield build_groups(Grid(1, size // tensor_size, tensor_size), timeout_s)
        failed = False
    finally:
        # After an error the process exits, which the other ranks notice. Destroying groups could wait for a lost peer.
        if size == 1 or not failed:
            dist.destroy_process_group()


@contextmanager
def single_process(timeout_s: float = 600.0, device: str = "cpu") -> Iterator[Groups]:
    """A world of one rank, for tools that run the model in one process, whatever the environment says."""
    with world_groups(1, device, timeout_s, environment={}) as groups:
        yield groups
