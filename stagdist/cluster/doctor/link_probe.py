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
from collections.abc import Callable, Sequence
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
LATENCY_ROUNDS = 40
REPEATS = 3
SMALL_BYTES = 4
TRIAL_BYTES = 1 << 20
LARGEST_BYTES = 16 << 20
AIM_S = 0.2
"""Seconds that one large message may take. Over slow links it is made smaller."""

STEP_S = 30.0
"""Limit of each step of the measurement, in seconds."""


class Meter:
    """Measures on one rank; every rank makes the same calls in the same order.

    Args:
        grid: of all ranks.
        rank: of this process.
        device: cpu or cuda:N.
    """

    def __init__(self, grid: Grid, rank: int, device: "torch.device"):
        self.grid, self.rank, self.device = grid, rank, device
        self.large_bytes = self._fitting()

    def links(self) -> list[Link]:
        """Links whose first rank is this one."""
        return [*self._boundaries(), *self._reductions()]

    def _tensor(self, num_bytes: int) -> "torch.Tensor":
        import torch

        return torch.zeros(num_bytes // 4, dtype=torch.float32, device=self.device)

    def _timed(self, action: Callable[[], Any]) -> float:
        import torch

        started = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _fitting(self) -> int:
        """Bytes of a large message. All ranks agree on it: the slowest link decides."""
        import torch
        import torch.distributed as dist

        trial = self._tensor(TRIAL_BYTES)
        dist.all_reduce(trial)  # opens the connections
        slowest = torch.tensor([self._timed(lambda: dist.all_reduce(trial))], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return int(min(LARGEST_BYTES, TRIAL_BYTES * max(1.0, AIM_S / slowest.item()))) // 4 * 4

    # --- stage boundaries -------------------------------------------------------------------------------------------

    def _boundaries(self) -> list[Link]:
        """Every second boundary at a time, so that no rank is in two; all replicas at once, as in training."""
        import torch.distributed as dist

        found = []
        place = self.grid.coordinate(self.rank)
        for turn in (0, 1):
            dist.barrier()
            first = place.pipe if place.pipe % 2 == turn else place.pipe - 1
            if 0 <= first < self.grid.pipe - 1:
                left, right = (self.grid.rank(stage, place.data, place.tensor) for stage in (first, first + 1))
                measured = self._boundary(left, right)
                if self.rank == left:
                    found.append(measured)
        return found

    def _boundary(self, left: int, right: int) -> Link:
        """One boundary; only the figures of its first rank count."""
        latency_s = statistics.median(self._exchanges(left, right, SMALL_BYTES, SMALL_BYTES, LATENCY_ROUNDS)) / 2
        speeds = []
        for there, back in ((self.large_bytes, SMALL_BYTES), (SMALL_BYTES, self.large_bytes)):
            shortest_s = min(self._exchanges(left, right, there, back, REPEATS))
            speeds.append(self.large_bytes / max(shortest_s - latency_s, shortest_s / 2))
        return Link("pipe", (left, right), latency_s, tuple(speeds))

    def _exchanges(self, left: int, right: int, there_bytes: int, back_bytes: int, rounds: int) -> list[float]:
        """Seconds of messages to the right that are each answered by one to the left."""
        import torch.distributed as dist

        there, back = self._tensor(there_bytes), self._tensor(back_bytes)

        def exchange() -> None:
            if self.rank == left:
                dist.send(there, right)
                dist.recv(back, right)
            else:
                dist.recv(there, left)
                dist.send(back, left)

        exchange()  # opens the connection
        return [self._timed(exchange) for _ in range(rounds)]

    # --- groups -----------------------------------------------------------------------------------------------------

    def _reductions(self) -> list[Link]:
        """All groups of an axis at once, as in training."""
        import torch.distributed as dist

        found = []
        everyone = [list(range(self.grid.world_size))]
        axes = {"tensor": self.grid.tensor_groups(), "data": self.grid.data_groups(), "all": everyone}
        for axis, groups in axes.items():
            if len(groups[0]) > 1:
                made = [dist.new_group(ranks, timeout=timedelta(seconds=STEP_S)) for ranks in groups]
                dist.barrier()
                index = next(index for index, ranks in enumerate(groups) if self.rank in ranks)
                measured = self._reduction(axis, groups[index], made[index])
                if self.rank == groups[index][0]:
                    found.append(measured)
        return found

    def _reduction(self, axis: str, ranks: Sequence[int], group: "dist.ProcessGroup") -> Link:
        import torch.distributed as dist

        def reduce(tensor: "torch.Tensor") -> float:
            return self._timed(lambda: dist.all_reduce(tensor, group=group))

        number, large = self._tensor(SMALL_BYTES), self._tensor(self.large_bytes)
        reduce(number)  # opens the connections
        latency_s = statistics.median(reduce(number) for _ in range(LATENCY_ROUNDS))
        times_s, correct = [], True
        for _ in range(REPEATS):
            large.fill_(ranks.index(self.rank) + 1)
            times_s.append(reduce(large))
            correct = correct and bool((large == len(ranks) * (len(ranks) + 1) / 2).all())
        return Link(axis, tuple(ranks), latency_s, (self.large_bytes / min(times_s),), correct)


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
        name = torch.cuda.get_device_name(device) if cuda else "cpu"
        own = (socket.gethostname(), name, Meter(grid, world.rank, device).links())
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, own)
        dist.barrier()  # no rank leaves while another still receives
    finally:
        dist.destroy_process_group()
    if world.rank:
        return None
    hosts, devices, links = zip(*gathered, strict=True)
    sizes, backend = (grid.pipe, grid.data, grid.tensor), "nccl" if cuda else "gloo"
    return LinkReport(grid=sizes, backend=backend, hosts=hosts, devices=devices, links=tuple(chain(*links)))


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
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for sentinel in connection.wait(list(running)):
            running.pop(sentinel).join()  # type: ignore[call-overload]
        if any(rank.exitcode for rank in ranks):  # the others would wait for it until their time is up
            for rank in running.values():
                rank.kill()
    return int(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    sys.exit(main())
