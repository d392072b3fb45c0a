"""The program that the doctor runs on every host: starts the host's ranks, which measure the links between all ranks.

Rank 0 prints a `LinkReport`; a rank that fails prints one line to standard error. One code path: nccl where there are
devices, gloo where there are none.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from multiprocessing import connection, get_context
from typing import TYPE_CHECKING, Any

from stagdist.cluster.doctor.facts import Link, LinkReport
from stagdist.parallel.grid import Grid
from stagdist.parallel.world import World, choose_device, join_launcher, join_world

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

ERROR_PREFIX = "rank "
AXES = ("pipe", "tensor", "data", "all")
LATENCY_ROUNDS = 40
REPEATS = 3
SMALL_BYTES = 4
TRIAL_BYTES = 1 << 20
LARGEST_BYTES = 16 << 20
AIM_S = 0.2
"""Seconds that one large message may take. Over slow links it is made smaller."""

STEP_S = 30.0
"""Limit of each step of the measurement, in seconds."""


def rounds(grid: Grid) -> list[tuple[str, list[list[int]]]]:
    """Axes with groups of ranks that are measured at the same time, as in training: all replicas at once.

    Every second stage boundary at a time, so that no rank is in two.
    """
    pipes = grid.pipe_groups()
    turns = [
        [ranks[stage : stage + 2] for stage in range(turn, grid.pipe - 1, 2) for ranks in pipes] for turn in (0, 1)
    ]
    everyone = [list(range(grid.world_size))]
    axes = [("pipe", turns[0]), ("pipe", turns[1]), ("tensor", grid.tensor_groups()), ("data", grid.data_groups())]
    return [(axis, groups) for axis, groups in [*axes, ("all", everyone)] if groups and len(groups[0]) > 1]


class Meter:
    """Measures on one rank. Large messages are as large as the slowest link allows.

    Args:
        device: cpu or cuda:N.
    """

    def __init__(self, device: "torch.device"):
        import torch
        import torch.distributed as dist

        self._device = device
        trial = self._tensor(TRIAL_BYTES)
        self._reduce(trial)  # opens the connections
        slowest = torch.tensor([self._reduce(trial)], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        self._large_bytes = int(min(LARGEST_BYTES, TRIAL_BYTES * max(1.0, AIM_S / slowest.item()))) // 4 * 4

    def _tensor(self, num_bytes: int) -> "torch.Tensor":
        import torch

        return torch.zeros(num_bytes // 4, dtype=torch.float32, device=self._device)

    def _reduce(self, tensor: "torch.Tensor", group: "dist.ProcessGroup | None" = None) -> float:
        """Seconds of an all-reduce."""
        import torch
        import torch.distributed as dist

        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    def measure(self, axis: str, ranks: Sequence[int], group: "dist.ProcessGroup") -> Link:
        """The link between the ranks of a group, which all call this at the same time."""
        import torch.distributed as dist

        number, large = self._tensor(SMALL_BYTES), self._tensor(self._large_bytes)
        self._reduce(number, group)  # opens the connections
        latency_s = statistics.median(self._reduce(number, group) for _ in range(LATENCY_ROUNDS))
        times_s, correct = [], True
        for _ in range(REPEATS):
            large.fill_(ranks.index(dist.get_rank()) + 1)
            times_s.append(self._reduce(large, group))
            correct = correct and bool((large == len(ranks) * (len(ranks) + 1) / 2).all())
        return Link(axis, tuple(ranks), latency_s, self._large_bytes / min(times_s), correct)


def measure(grid: Grid, world: World, start_s: float) -> LinkReport | None:
    """Join the ranks and measure; rank 0 returns the complete result.

    Args:
        grid: of all ranks.
        world: place of this one.
        start_s: for all ranks to join, in seconds.

    Raises:
        ConfigError: there are fewer devices than ranks on this host.
        TransportError: the ranks did not meet.
    """
    import torch
    import torch.distributed as dist

    device = torch.device(choose_device("auto", world.local_rank))
    cuda = device.type == "cuda"
    join_world(str(device), STEP_S, start_timeout_s=start_s)
    try:
        meter, links = Meter(device), []
        for axis, groups in rounds(grid):
            made = [dist.new_group(ranks, timeout=timedelta(seconds=STEP_S)) for ranks in groups]
            dist.barrier()
            for ranks, group in zip(groups, made, strict=True):
                if world.rank in ranks:
                    link = meter.measure(axis, ranks, group)
                    links += [link] if world.rank == ranks[0] else []
        name = torch.cuda.get_device_name(device) if cuda else "cpu"
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, (socket.gethostname(), name, links))
        dist.barrier()  # no rank leaves while another still receives
    finally:
        dist.destroy_process_group()
    if world.rank:
        return None
    hosts, devices, found = zip(*gathered, strict=True)
    by_axis = tuple(link for axis in AXES for link in chain(*found) if link.axis == axis)
    sizes, backend = (grid.pipe, grid.data, grid.tensor), "nccl" if cuda else "gloo"
    return LinkReport(grid=sizes, backend=backend, hosts=hosts, devices=devices, links=by_axis)


# --- processes ------------------------------------------------------------------------------------------------------


def run_rank(grid: Grid, world: World, start_s: float) -> None:
    """Measure on one rank, in a process of its own. MASTER_ADDR and MASTER_PORT are in the environment."""
    names = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    os.environ.update({name: str(value) for name, value in (names | {"LOCAL_WORLD_SIZE": world.local_size}).items()})
    code = 0
    try:
        join_launcher().share_cores()
        report = measure(grid, world, start_s)
        if report is not None:
            print(report.model_dump_json(), flush=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        line = f"{ERROR_PREFIX}{world.rank} on {socket.gethostname()}: {type(error).__name__}: {reason}\n"
        os.write(sys.stderr.fileno(), line.encode())  # at once: the ranks of a host share standard error
        code = 1
    os._exit(code)  # threads of a backend that has failed may hang


def main() -> int:
    """Exit code: 0 measured, 1 a rank failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=3, required=True, metavar=("PIPE", "DATA", "TENSOR"))
    parser.add_argument("--first-rank", type=int, required=True, help="on this host")
    parser.add_argument("--ranks", type=int, required=True, help="on this host")
    parser.add_argument("--start-s", type=float, required=True, help="for all ranks to join, in seconds")
    given = parser.parse_args()
    grid = Grid(*given.grid)
    worlds = [World(given.first_rank + local, grid.world_size, local, given.ranks) for local in range(given.ranks)]
    # Forks: no framework has been imported yet, and Python starts only once for all ranks of the host.
    fork = get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(grid, world, given.start_s)) for world in worlds]
    for rank in ranks:
        rank.start()
    running = list(ranks)
    while running and not any(rank.exitcode for rank in ranks):
        connection.wait([rank.sentinel for rank in running])
        running = [rank for rank in running if rank.exitcode is None]
    for rank in running:
        rank.kill()  # after the first failure the others would wait until their time is up
    return int(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    sys.exit(main())
