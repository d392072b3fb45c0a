"""A step of one process as a CUDA graph: the host issues one launch instead of hundreds.

One graph for each number of rows and each reach of the caches. Inside, sections that do not depend on each other run on
streams of their own. On other devices the same fixed-shape step runs without being captured.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 256
"""Graphs look at a multiple of this many cache entries."""
WARM_UP_RUNS = 3


class SectionStreams:
    """A stream for each section beside the current one; without CUDA everything runs in order."""

    def __init__(self, device: str, sections: Sequence[int]):
        cuda = device.startswith("cuda") and len(sections) > 1
        self._streams = {section: torch.cuda.Stream() for section in sections} if cuda else {}

    @contextmanager
    def of(self, section: int) -> Iterator[None]:
        """Work inside goes to the section's stream, after everything issued before on the current one."""
        if section not in self._streams:
            yield
            return
        stream = self._streams[section]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """What follows on the current stream waits for all sections."""
        for stream in self._streams.values():
            torch.cuda.current_stream().wait_stream(stream)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    positions: Tensor
    logits: Tensor


class StepGraphs:
    """Runs a fixed-shape step: (positions int64 [B], reach) -> logits [B, V].

    Args:
        body: the step; reads its inputs from tensors that stay in place, and changes caches in place.
        keep: state that a warm-up run must not change, restored afterwards.
        capacity: entries of the caches.
    """

    def __init__(
        self, body: Callable[[Tensor, int], Tensor], keep: Callable[[], list[Tensor]], device: str, capacity: int
    ):
        self._body, self._keep, self._device, self._capacity = body, keep, device, capacity
        self._captured: dict[tuple[int, int], _Captured] = {}

    def run(self, positions: Sequence[int]) -> Tensor:
        """Logits of a step with these positions; the tensor is overwritten by the next one of its shape."""
        reach = min(-(-(max(positions) + 1) // REACH) * REACH, self._capacity)
        host = torch.tensor(positions)
        if not self._device.startswith("cuda"):
            return self._body(host, reach)
        key = (len(positions), reach)
        if key not in self._captured:
            self._captured[key] = self._capture(host.to(self._device), reach)
        captured = self._captured[key]
        captured.positions.copy_(host.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.logits

    def _capture(self, positions: Tensor, reach: int) -> _Captured:
        """Warm up, put the state back, record."""
        kept = [tensor.clone() for tensor in self._keep()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._body(positions, reach)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(self._keep(), kept, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._body(positions, reach)
        return _Captured(graph, positions, logits)
