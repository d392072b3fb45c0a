"""A decode step of one process as a CUDA graph: the host issues one launch instead of hundreds.

There is one graph for each number of rows and each reach, the number of cache entries that attention reads. Both are
rounded up to buckets, and all graphs are captured before the first prefill. On a CPU the same fixed-shape step runs
without being captured.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device
from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.hosted_sections import StageSections
from stagdist.decode.runtime.readout import Readout
from stagdist.decode.runtime.schedule import Kind
from stagdist.decode.topology import Limits
from stagdist.parallel.device import on_cuda

REACH = 256
"""Smallest reach of a graph, in cache entries."""
WARM_UP_RUNS = 2

CaptureProgress = Callable[[int, int], None]
"""Called after each capture with the number of graphs captured so far and the total."""


def row_buckets(num_slots: int) -> list[int]:
    """Numbers of rows that graphs are captured for: powers of two below `num_slots`, then `num_slots`."""
    return [*(1 << exponent for exponent in range((num_slots - 1).bit_length())), num_slots]


def reach_buckets(capacity: int, smallest: int) -> list[int]:
    """Reaches that graphs are captured for: multiples of `smallest` up to `capacity`, at most four per octave.

    This bounds both the number of graphs (32 for 131072 entries) and the unused entries that a graph reads (a quarter).
    """
    buckets: list[int] = []
    multiple = 0
    while multiple * smallest < capacity:
        multiple += max(1, (1 << multiple.bit_length()) // 8)
        buckets.append(min(multiple * smallest, capacity))
    return buckets


class FixedStep:
    """A fixed-shape step up to the logits. On a GPU, each section runs on a separate stream."""

    def __init__(self, sections: StageSections, readout: Readout):
        self._sections, self._readout = sections, readout
        self._program = schedule.operation(sections.topology, 0, schedule.Work(0, 0, 0, (False,)))
        begun = [each.index for each in self._program if each.kind is Kind.BEGIN]
        self._streams: dict[int, torch.cuda.Stream] = {}
        if on_cuda(sections.device.name) and len(begun) > 1:
            self._streams = {section: torch.cuda.Stream(sections.device.name) for section in begun}

    def __call__(self, positions: Tensor, reach: int) -> Tensor:
        """Run the step. Shapes: positions int64 [B], on the device -> logits [B, V]."""
        sections, readout = self._sections, self._readout
        call = sections.fixed_call(positions, reach)
        for stream in self._streams.values():  # a capture may join only streams that were forked from it
            stream.wait_stream(torch.cuda.current_stream())
        for instruction in self._program:
            match instruction.kind:
                case Kind.BEGIN:
                    if sections.topology.lag == 0:
                        self._join()  # the section reads what the previous one computes in this step
                    with self._stream_of(instruction.index):
                        sections.begin(call, instruction.index)
                case Kind.FINISH:
                    with self._stream_of(instruction.index):
                        sections.finish(call, instruction.index)
                case Kind.COMBINE:
                    self._join()
                    readout.combine(call.outputs, None)
                case Kind.HEAD:
                    self._join()
                    readout.head(call.outputs[sections.last])
        sections.push_local(call)
        logits, readout.logits = readout.logits, None
        assert logits is not None
        return logits

    @contextmanager
    def _stream_of(self, section: int) -> Iterator[None]:
        """Issue work to the section's stream, after everything issued before to the current one."""
        if section not in self._streams:
            yield
            return
        stream = self._streams[section]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield

    def _join(self) -> None:
        """Make the current stream wait for all sections."""
        for stream in self._streams.values():
            torch.cuda.current_stream().wait_stream(stream)


class StepGraphs:
    """Runs fixed-shape steps, on a GPU as CUDA graphs.

    Args:
        step: (positions int64 [B], reach) -> logits [B, V]. It reads its other inputs from tensors that stay in place,
            and changes caches in place.
    """

    def __init__(self, step: Callable[[Tensor, int], Tensor], device: Device, limits: Limits):
        self._step, self._device = step, device
        self._rows = row_buckets(limits.num_slots)
        self._reaches = reach_buckets(limits.max_context, REACH)
        self._positions = torch.zeros(limits.num_slots, dtype=torch.int64, device=device.name)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None  # [slots, V], of all graphs: each would keep its own otherwise

    @torch.inference_mode()
    def capture(self, progress: CaptureProgress | None = None) -> None:
        """Capture all graphs; does nothing on a CPU.

        Must be called before the first prefill, because the runs write to position 0 of every slot. A prefill
        overwrites it, and fills the slot's hand-off.
        """
        if not on_cuda(self._device.name):
            return
        # The largest come first: the smaller ones then fit into the pool's memory.
        shapes = [(rows, reach) for rows in reversed(self._rows) for reach in reversed(self._reaches)]
        with torch.cuda.device(self._device.name):
            stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream())
            for done, (rows, reach) in enumerate(shapes, start=1):
                self._graphs[rows, reach] = self._capture(rows, reach, stream, pool)
                if progress is not None:
                    progress(done, len(shapes))
            torch.cuda.current_stream().wait_stream(stream)

    def run(self, positions: Sequence[int]) -> Tensor:
        """Logits [B, V] of a step of rows 0 to B - 1 at these positions; the next step overwrites them.

        Rows above B, up to the bucket, have no request.
        """
        count = len(positions)
        rows = self._rows[bisect_left(self._rows, count)]
        reach = self._reaches[bisect_right(self._reaches, max(positions))]
        placed = self._positions[:rows]
        placed.copy_(self._device.upload([*positions, *[-1] * (rows - count)], torch.int64))
        if not on_cuda(self._device.name):
            return self._step(placed, reach)[:count]
        assert (rows, reach) in self._graphs, f"no graph of {rows} rows and reach {reach} was captured"
        assert self._logits is not None
        self._graphs[rows, reach].replay()
        return self._logits[:count]

    def close(self) -> None:
        """Release the graphs and their memory."""
        if self._graphs:
            torch.cuda.synchronize(self._device.name)
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._logits = None

    def _capture(self, rows: int, reach: int, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
        positions = self._positions[:rows]
        # On the capture stream, so that cuBLAS has its workspace there and all kernels are loaded before the capture.
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                logits = self._step(positions, reach)
            if self._logits is None:
                self._logits = torch.empty_like(logits)  # the first graph has the most rows
            self._logits[:rows] = logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._logits[:rows] = self._step(positions, reach)
        with torch.cuda.stream(stream):
            graph.replay()  # the first launch uploads the graph, which would stall a token
        return graph
