"""A decode step as one CUDA graph on every rank: the host issues one launch instead of hundreds.

The graph holds the sections of the rank, the hand-offs, the head, the choice and the transfer of the token. Tokens and
positions stay on the device, so a step is launched before the host has read the token of the previous one. There is
one graph for each number of rows, rounded up to a bucket, and each way of choosing. All are captured before the first
prefill, by all ranks in the same order. On a CPU the same step of fixed shape runs without being captured.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.executor import Executor
from stagdist.decode.runtime.hosted_sections import Call
from stagdist.decode.runtime.schedule import Instruction, Kind, WorkPart
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.parallel.device import on_cuda

WARM_UP_RUNS = 2
_HAND_OFF = (WorkPart.STEP, 0)

CaptureProgress = Callable[[int, int], None]
"""Called after each capture with the number of graphs captured so far and the total."""


def row_buckets(num_slots: int) -> list[int]:
    """Numbers of rows that graphs are captured for: powers of two below `num_slots`, then `num_slots`."""
    return [*(1 << exponent for exponent in range((num_slots - 1).bit_length())), num_slots]


class FixedStep:
    """A step of fixed shape. On a GPU, each section runs on a separate stream, if they do not wait for each other.

    With tensor parallelism they would: they share a communicator.
    """

    def __init__(self, executor: Executor):
        self._executor, self._sections, self._readout = executor, executor.sections, executor.readout
        setup = executor.setup
        self._programs = {
            chooses: schedule.fixed_step(setup.topology, setup.index, 0, chooses=chooses) for chooses in (True, False)
        }
        slots, size, device = setup.limits.num_slots, setup.model.hidden_size, setup.device
        self._arrivals = torch.zeros(slots, 1, size, dtype=device.dtype, device=device.name)
        begun = [each.index for each in self._programs[True] if each.kind is Kind.BEGIN]
        self._streams: dict[int, torch.cuda.Stream] = {}
        if on_cuda(device.name) and len(begun) > 1 and setup.topology.lag and setup.tensor_size == 1:
            self._streams = {section: torch.cuda.Stream(device.name) for section in begun}

    def __call__(self, positions: Tensor, mode: Mode) -> None:
        """Run the step of rows 0 to B - 1 and advance every position.

        The tokens are then in `StageSections.tokens`; with `Mode.OTHER` the logits are in `Readout.logits` instead.

        Shapes: positions int64 [B], on the device; -1 for rows without a request.
        """
        sections, transport = self._sections, self._executor.setup.transport
        call = sections.fixed_call(positions)
        for stream in self._streams.values():  # a capture may join only streams that were forked from it
            stream.wait_stream(torch.cuda.current_stream())
        for instruction in self._programs[mode is not Mode.OTHER]:
            self._perform(call, instruction, positions, mode)
        sections.push(call)
        if mode is not Mode.OTHER:
            sections.tokens[: call.rows] = self._readout.choice.tokens
        positions += positions >= 0
        if transport is not None:
            transport.finish_sends()  # a graph ends when all its streams have been joined

    def _perform(self, call: Call, instruction: Instruction, positions: Tensor, mode: Mode) -> None:
        sections = self._sections
        match instruction.kind:
            case Kind.EXPECT:
                self._executor.setup.link.hand_offs_in.expect(_HAND_OFF, self._arrivals[: call.rows], now=True)
            case Kind.WAIT:
                (call.carried,) = self._executor.setup.link.hand_offs_in.take(_HAND_OFF)
            case Kind.BEGIN:
                with self._stream_of(instruction.index):
                    sections.begin(call, instruction.index)
            case Kind.FINISH:
                with self._stream_of(instruction.index):
                    sections.finish(call, instruction.index)
            case Kind.CHOOSE:
                self._readout.choose_in_graph(mode, positions + 1)
            case _:
                for stream in self._streams.values():
                    torch.cuda.current_stream().wait_stream(stream)
                self._executor.perform(call, instruction)

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


class StepGraphs:
    """Runs steps of fixed shape, on a GPU as CUDA graphs."""

    def __init__(self, executor: Executor):
        setup = executor.setup
        self._step, self._readout, self._device = FixedStep(executor), executor.readout, setup.device
        self._transport = setup.transport
        self._rows = row_buckets(setup.limits.num_slots)
        self._positions = torch.full((setup.limits.num_slots,), -1, dtype=torch.int64, device=setup.device.name)
        self._graphs: dict[tuple[int, Mode], torch.cuda.CUDAGraph] | None = None  # None until `capture`, on a GPU
        self._logits: Tensor | None = None  # [slots, V], of all graphs: each would keep its own otherwise

    @torch.inference_mode()
    def capture(self, progress: CaptureProgress | None = None) -> None:
        """Capture all graphs; does nothing on a CPU.

        Must be called before the first prefill, on all ranks. A prefill captures nothing, because capturing waits for
        the device and would stall all requests.

        One capture stream and one memory pool for all graphs: cuBLAS keeps a workspace per stream that lasts as long as
        the graphs that use it, and no two of these graphs run at once. Graphs with more rows come first, so that the
        pool is as large as the largest graph needs.
        """
        if not on_cuda(self._device.name):
            return
        if self._transport is not None:
            self._transport.close_first(self)
        self._graphs = {}
        modes = (*self._readout.sampler.modes(), Mode.OTHER)
        shapes = [(rows, mode) for rows in reversed(self._rows) for mode in modes]
        with torch.cuda.device(self._device.name):
            stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream())
            for done, (rows, mode) in enumerate(shapes, start=1):
                self._graphs[rows, mode] = self._capture(rows, mode, stream, pool)
                if progress is not None:
                    progress(done, len(shapes))
            torch.cuda.current_stream().wait_stream(stream)

    def place(self, positions: Sequence[int]) -> None:
        """Set the positions of all slots, -1 where there is no request. Steps advance them."""
        self._positions.copy_(self._device.upload(positions, torch.int64))

    def run(self, count: int, mode: Mode) -> None:
        """Run a step of rows 0 to `count` - 1. Rows above, up to the bucket, have no request."""
        rows = self._rows[bisect_left(self._rows, count)]
        if self._graphs is not None:
            self._graphs[rows, mode].replay()
        else:
            self._step(self._positions[:rows], mode)
            self._keep_logits(rows, mode)
        self._readout.logits = None if self._logits is None or mode is not Mode.OTHER else self._logits[:count]

    def close(self) -> None:
        """Release the graphs and their memory; the step cannot run afterwards."""
        if self._graphs:
            torch.cuda.synchronize(self._device.name)
            for graph in self._graphs.values():
                graph.reset()
            self._graphs.clear()
        self._logits = None

    def _keep_logits(self, rows: int, mode: Mode) -> None:
        """Move the logits of a step, if this rank has any, to their fixed address."""
        logits, self._readout.logits = self._readout.logits, None
        if mode is Mode.OTHER and logits is not None:
            if self._logits is None:
                self._logits = logits.new_empty(self._rows[-1], logits.shape[1])
            self._logits[:rows] = logits

    def _capture(self, rows: int, mode: Mode, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
        positions = self._positions[:rows]
        # On the capture stream, so that cuBLAS has its workspace there and all kernels are loaded before the capture.
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._step(positions, mode)
                self._keep_logits(rows, mode)
            if self._transport is not None:  # `torch.cuda.graph` waits for the device, too, but without a time limit
                self._transport.wait_for_device("while its steps were captured")
        graph = torch.cuda.CUDAGraph()
        communication = nullcontext() if self._transport is None else self._transport.capturing()
        # NCCL's watchdog thread may call CUDA during a capture.
        with communication, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._step(positions, mode)
            self._keep_logits(rows, mode)
        with torch.cuda.stream(stream):
            graph.replay()  # the first launch uploads the graph, which would stall a token
        return graph
