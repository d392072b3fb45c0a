"""One process of the decode benchmark: its rank, its communicators, and what it shares with the other processes."""

import ctypes
import gc
import itertools
import socket
import statistics
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common.conditions import OtherPrograms, conditions, usable_cores
from stagdist.config.parts import ModelConfig
from stagdist.decode.native.layer_math import NativeMath
from stagdist.decode.runtime.build import EngineOptions, use_native
from stagdist.decode.runtime.transport import Transport
from stagdist.parallel.device import on_cuda
from stagdist.parallel.grid import Grid
from stagdist.telemetry.clocks import Clock, EventClock, HostClock
from stagdist.telemetry.hardware import memory_bytes

BANDWIDTH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Read to measure memory bandwidth: far more than any cache holds, and long enough to hide the launch of a kernel."""


READ_WIDTH = 1024
_READ_MODEL = ModelConfig(
    vocab_size=8, hidden_size=READ_WIDTH, intermediate_size=8, num_attention_heads=8, max_position_embeddings=8,
    section_layers=[1, 1],
)  # fmt: skip


class DecodeSite:
    """This process.

    Attributes:
        beside_s: core seconds of a process that the benchmark runs beside this one.

    Args:
        transport: of the pipeline over all ranks; None in a world of one.
        threads: threads of torch in this process.
        timeout_s: limit of every wait between ranks.
    """

    def __init__(self, transport: Transport | None, device: str, threads: int, timeout_s: float):
        self.device, self.threads, self._timeout_s, self._host = device, threads, timeout_s, None
        self.rank, self.size = (0, 1) if transport is None else (transport.rank, transport.grid.world_size)
        self.stage = 0 if transport is None else transport.stage
        self._transports = {} if transport is None else {(1, transport.combined): transport}
        if transport is not None:
            self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.beside_s: Callable[[], float] = lambda: 0.0
        self._others = OtherPrograms(lambda seconds: sum(self.gather(seconds + self.beside_s())))

    def transport(self, tensor: int = 1, *, combined: bool = False) -> Transport | None:
        """Communicators of the grid with this tensor axis; made once, by all ranks together.

        Args:
            combined: section outputs are summed over the stages.
        """
        if self.size == 1:
            return None
        key = (tensor, combined)
        if key not in self._transports:
            grid = Grid(self.size // tensor, 1, tensor)
            self._transports[key] = Transport(grid, self.device, self._timeout_s, combined=combined)
        return self._transports[key]

    def close(self) -> None:
        """Close the communicators that this site made, when all ranks are here."""
        self.barrier()
        for transport in list(self._transports.values())[1:]:
            transport.close()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self._host is None:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._host)
        return gathered

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return self.gather(value)[0]

    def processes_per_core(self) -> float:
        """On the host with most; above 1, processes share cores."""
        places = self.gather((socket.gethostname(), usable_cores()))
        return max(places.count(place) / place[1] for place in places)

    def conditions(self) -> dict[str, object]:
        """Commit, versions, and the CPUs or GPUs that the processes use. All ranks call it."""
        gpus = len({place for place in self.gather((socket.gethostname(), self.device)) if on_cuda(place[1])})
        return conditions(torch.cuda.get_device_name(self.device) if gpus else None, gpus)

    def others(self) -> float:
        """Share of rank 0's machine that other programs used since the last call, the same on all ranks."""
        return float(self.from_first(self._others.share()))

    def barrier(self) -> None:
        """Wait for all ranks without using a core."""
        if self._host is not None:
            dist.barrier(group=self._host)

    def held_bytes(self) -> int:
        """Memory of this process, after freed memory has returned to the system."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory
        if trim is not None:
            trim(0)
        return torch.cuda.memory_allocated(self.device) if on_cuda(self.device) else memory_bytes()[1]

    def clock(self) -> Clock:
        """A clock for work of this device. Making one waits for the device."""
        return EventClock() if on_cuda(self.device) else HostClock()

    def read_bandwidths(self) -> tuple[list[float], list[float]]:
        """Bytes per second that each rank reads from memory: while all read, and one after the other."""
        size = BANDWIDTH_BYTES["cpu"]
        if on_cuda(self.device):
            size = min(BANDWIDTH_BYTES["cuda"], torch.cuda.mem_get_info(self.device)[0] // 2)
        buffer = torch.ones(size // 4, device=self.device)
        read_bandwidth(buffer, repeats=1)  # the first pass loads the kernel
        self.barrier()
        together, alone = self.gather(read_bandwidth(buffer)), []
        for rank in range(self.size):
            alone.append(self.gather(read_bandwidth(buffer) if rank == self.rank else 0.0)[rank])
        return together, alone


def read_bandwidth(buffer: torch.Tensor, repeats: int = 15) -> float:
    """Bytes per second that this process reads from a buffer's memory with the faster of its readers.

    Of each the median of several passes: where processes share cores, the best one had a core for itself.
    """
    clock = EventClock() if on_cuda(buffer.device) else HostClock()
    return max(_bandwidth(reader, buffer.nbytes, clock, repeats) for reader in readers_of(buffer))


def readers_of(buffer: torch.Tensor) -> list[Callable[[], object]]:
    """A sum and, on a CPU with a compiler, a product of the compiled layers, which reads in several places at once."""
    readers: list[Callable[[], object]] = [buffer.sum]
    if not on_cuda(buffer.device) and use_native(EngineOptions(precision="fp32"), "cpu"):
        weight, math = buffer.view(-1, READ_WIDTH), NativeMath(_READ_MODEL, 1, None, torch.float32)
        row, gain = torch.ones(1, READ_WIDTH), torch.ones(READ_WIDTH)
        readers.append(partial(math.norm_linear, row, gain, weight))
    return readers


def _bandwidth(reader: Callable[[], object], nbytes: int, clock: Clock, repeats: int) -> float:
    marks = [clock.mark()]
    for _ in range(repeats):
        reader()
        marks.append(clock.mark())
    times_ns = [clock.nanoseconds(mark) for mark in marks]
    return 1e9 * nbytes / statistics.median(end - begin for begin, end in itertools.pairwise(times_ns))
