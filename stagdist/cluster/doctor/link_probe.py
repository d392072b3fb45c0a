"""What the doctor starts on every rank, through the launcher: measures stage boundaries and all-reduces.

Rank 0 prints the result in marked pieces, short enough for launchers that cut long lines. One code path: nccl where
there are devices, gloo where there are none.
"""

import argparse
import base64
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

from stagdist.cluster.doctor.facts import Boundary, Links, Reduction
from stagdist.parallel.grid import Grid
from stagdist.parallel.world import World, join_launcher

if TYPE_CHECKING:
    import torch

RESULT_PREFIX = "STAGDIST-LINKS"
ERROR_PREFIX = "STAGDIST-LINKS-ERROR"
PIECE = 1000
"""Characters of the result in one line."""

LATENCY_ROUNDS = 40
REPEATS = 3
TRIAL_BYTES = 1 << 20
AIM_S = 0.2
"""Seconds that one large message may take: on a slow link it is made smaller."""


class Meter:
    """Measures on one rank; every rank makes the same calls in the same order.

    Args:
        grid: of all ranks.
        rank: of this process.
        device: cpu or cuda:N.
        largest_bytes: of a message.
    """

    def __init__(self, grid: Grid, rank: int, device: "torch.device", largest_bytes: int):
        self.grid, self.rank, self.device, self.largest_bytes = grid, rank, device, largest_bytes

    def _bytes(self, size: int) -> "torch.Tensor":
        import torch

        return torch.zeros(max(1, size // 4), dtype=torch.float32, device=self.device)

    def _timed(self, action: Callable[[], None]) -> float:
        import torch

        started = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _fitting(self, trial_s: float) -> int:
        return int(min(self.largest_bytes, max(TRIAL_BYTES, TRIAL_BYTES * AIM_S / max(trial_s, 1e-9))))

    # --- stage boundaries -------------------------------------------------------------------------------------------

    def boundaries(self) -> list[Boundary]:
        """Boundaries whose first rank is this one. Every second one at a time, so that no rank is in two; all replicas
        at once, as in training."""
        import torch.distributed as dist

        found = []
        place = self.grid.coordinate(self.rank)
        for turn in (0, 1):
            dist.barrier()
            first = place.pipe if place.pipe % 2 == turn else place.pipe - 1
            if 0 <= first < self.grid.pipe - 1:
                left, right = (self.grid.rank(stage, place.data, place.tensor) for stage in (first, first + 1))
                measured = self._boundary(first, left, right)
                if self.rank == left:
                    found.append(measured)
        dist.barrier()
        return found

    def _boundary(self, stage: int, left: int, right: int) -> Boundary:
        """One boundary; the figures of its first rank count."""
        latency_s = self._round_trip(left, right, 4, LATENCY_ROUNDS) / 2
        size = self._fitting(self._round_trip(left, right, TRIAL_BYTES, 1) / 2)
        size = int(self._told(left, right, size))
        forward_s = self._one_way(left, right, size, latency_s)
        backward_s = self._told(right, left, self._one_way(right, left, size, latency_s))
        return Boundary(stage, (left, right), latency_s, size / forward_s, size / backward_s)

    def _round_trip(self, left: int, right: int, size: int, rounds: int) -> float:
        """Median time there and back."""
        import torch.distributed as dist

        message = self._bytes(size)

        def exchange() -> None:
            if self.rank == left:
                dist.send(message, right)
                dist.recv(message, right)
            else:
                dist.recv(message, left)
                dist.send(message, left)

        exchange()  # opens the connection
        return statistics.median(self._timed(exchange) for _ in range(rounds))

    def _one_way(self, source: int, target: int, size: int, latency_s: float) -> float:
        """Shortest time of a large message; only the source's figure counts."""
        import torch.distributed as dist

        message, receipt = self._bytes(size), self._bytes(4)

        def send() -> None:
            if self.rank == source:
                dist.send(message, target)
                dist.recv(receipt, target)
            else:
                dist.recv(message, source)
                dist.send(receipt, source)

        shortest = min(self._timed(send) for _ in range(REPEATS))
        return max(shortest - latency_s, shortest / 2)

    def _told(self, source: int, target: int, number: float) -> float:
        """The source's number, on both."""
        import torch
        import torch.distributed as dist

        message = torch.tensor([number], dtype=torch.float64, device=self.device)
        if self.rank == source:
            dist.send(message, target)
        else:
            dist.recv(message, source)
        return float(message.item())

    # --- groups -----------------------------------------------------------------------------------------------------

    def reductions(self, timeout: timedelta) -> list[Reduction]:
        """All-reduces of the groups whose first rank is this one; all groups of an axis at once, as in training."""
        import torch.distributed as dist

        found = []
        everyone = [list(range(self.grid.world_size))]
        for axis, groups in (
            ("tensor", self.grid.tensor_groups()),
            ("data", self.grid.data_groups()),
            ("all", everyone),
        ):
            if len(groups[0]) == 1:
                continue
            for ranks in groups:
                group = dist.new_group(ranks, timeout=timeout)
                if self.rank in ranks:
                    mine, own_ranks = group, ranks
            dist.barrier()
            measured = self._reduction(axis, own_ranks, mine)
            if self.rank == own_ranks[0]:
                found.append(measured)
        return found

    def _reduction(self, axis: str, ranks: list[int], group: Any) -> Reduction:
        import torch
        import torch.distributed as dist

        def reduce(tensor: "torch.Tensor") -> float:
            return self._timed(lambda: dist.all_reduce(tensor, group=group))

        number = self._bytes(4)
        reduce(number)
        latency_s = statistics.median(reduce(number) for _ in range(LATENCY_ROUNDS))
        slowest = torch.tensor([reduce(self._bytes(TRIAL_BYTES))], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        size = self._fitting(float(slowest.item()))
        large, shortest = self._bytes(size), float("inf")
        correct = True
        for _ in range(REPEATS):
            large.fill_(ranks.index(self.rank) + 1)
            shortest = min(shortest, reduce(large))
            correct = correct and bool((large == len(ranks) * (len(ranks) + 1) / 2).all())
        return Reduction(axis, tuple(ranks), latency_s, size / shortest, correct)


def measure(grid: Grid, world: World, largest_bytes: int, timeout_s: float, start_s: float = 60.0) -> Links | None:
    """Join the ranks and measure; rank 0 returns the complete result.

    Args:
        grid: of all ranks.
        world: place of this one.
        largest_bytes: of a message.
        timeout_s: of every step.
        start_s: for all ranks to come; hosts may load Python from one slow disk.

    Raises:
        ConfigError: there are fewer devices than ranks on this host.
        TransportError: the ranks did not meet.
    """
    import torch
    import torch.distributed as dist

    from stagdist.parallel.world import choose_device, join_world

    device = torch.device(choose_device("auto", world.local_rank))
    cuda = device.type == "cuda"
    join_world(str(device), timeout_s, start_timeout_s=start_s)
    try:
        meter = Meter(grid, world.rank, device, largest_bytes)
        name = torch.cuda.get_device_name(device) if cuda else "cpu"
        own = (socket.gethostname(), name, meter.boundaries(), meter.reductions(timedelta(seconds=timeout_s)))
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, own)
        dist.barrier()  # no rank leaves while another still receives
    finally:
        dist.destroy_process_group()
    return None if world.rank else _merged(grid, "nccl" if cuda else "gloo", gathered)


def _merged(grid: Grid, backend: str, gathered: list[Any]) -> Links:
    hosts, devices, boundaries, reductions = zip(*gathered, strict=True)
    sizes = (grid.pipe, grid.data, grid.tensor)
    return Links(sizes, backend, hosts, devices, tuple(chain(*boundaries)), tuple(chain(*reductions)))


def pieces(links: Links) -> list[str]:
    """The result as lines short enough for every launcher."""
    text = base64.b64encode(json.dumps(asdict(links)).encode()).decode()
    parts = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    return [f"{RESULT_PREFIX} {index}/{len(parts)} {part} END" for index, part in enumerate(parts)]


def main() -> int:
    """Exit code: 0 measured, 1 not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=3, required=True, metavar=("PIPE", "DATA", "TENSOR"))
    parser.add_argument("--largest-mib", type=int, default=16)
    parser.add_argument("--timeout-s", type=float, default=30.0, help="for each step of the measurement")
    parser.add_argument("--limit-s", type=int, default=120, help="for all; the kernel ends this process then")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Not a Python handler: those wait for the end of a call that hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(arguments.limit_s)
    try:
        world = join_launcher()
        world.share_cores()
        largest, limit_s = arguments.largest_mib << 20, arguments.limit_s
        links = measure(Grid(*arguments.grid), world, largest, arguments.timeout_s, 0.6 * limit_s)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        print(
            f"{ERROR_PREFIX} rank {os.environ.get('RANK', '?')} on {socket.gethostname()}: "
            f"{type(error).__name__}: {reason} END", flush=True,
        )  # fmt: skip
        return 1
    if links is not None:
        print("\n".join(pieces(links)), flush=True)
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())
