"""Executes the instructions of the schedule on one rank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from stagdist.decode.layers.runner import SectionCache
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.graphs import CaptureProgress, FixedStep, StepGraphs
from stagdist.decode.runtime.hosted_sections import Call, StageSections
from stagdist.decode.runtime.readout import Readout
from stagdist.decode.runtime.schedule import Instruction, Kind
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.sampler import Choice
from stagdist.telemetry.pulse import Phase, Pulse
from stagdist.telemetry.spans import SpanRecorder

CATEGORIES = {
    Kind.ASK: "send",
    Kind.EXPECT: "send",
    Kind.BEGIN: "compute",
    Kind.WAIT: "wait for memory",
    Kind.FINISH: "compute",
    Kind.SEND: "send",
    Kind.COMBINE: "combine",
    Kind.SHARE: "wait for last section",
    Kind.HEAD: "head",
    Kind.CHOOSE: "sampling",
    Kind.HOST: "host work",
    Kind.PUBLISH: "send",
    Kind.TOKEN: "wait for token",
}
"""Category of each instruction's span in a trace."""

_WAITS = {Kind.WAIT, Kind.SHARE, Kind.TOKEN}
"""Instructions that can wait for a peer."""

_NO_SPAN = nullcontext()
HostWork = Callable[[], None]


class Stage:
    """Executor of the schedule on one rank.

    Args:
        recorder: records a span for every instruction.
        pulse: heartbeat for a supervisor.
        graphs: run a step up to the logits as one graph (one process), not its instructions separately.
        progress: called after each CUDA graph that is captured.
    """

    def __init__(
        self,
        setup: StageSetup,
        *,
        recorder: SpanRecorder | None = None,
        pulse: Pulse | None = None,
        graphs: bool = False,
        progress: CaptureProgress | None = None,
    ):
        self.setup, self.readout, self._sections, self._recorder = setup, Readout(setup), StageSections(setup), recorder
        self.model, self.topology, self.limits = setup.model, setup.topology, setup.limits
        self.weights, self.device, self.index = setup.weights, setup.device, setup.index
        self._transport = setup.transport
        self._next_positions: dict[int, int] = {}  # of the active slots
        self.pulse = pulse or Pulse()
        self.step_number = 0
        self._first_step = 0
        self._programs: dict[int, tuple[Instruction, ...]] = {}
        self._graphs: StepGraphs | None = None
        if graphs:
            self._graphs = StepGraphs(FixedStep(self._sections, self.readout), setup.device, setup.limits)
            self._graphs.capture(progress)

    # --- operations, the same on every rank ---------------------------------------------------------------------

    def prefill(
        self, slot: int, input_ids: Sequence[int], params: SamplingParams, host_work: HostWork | None = None
    ) -> Choice:
        """Prefill a prompt into a slot and choose its first token on all ranks.

        Args:
            host_work: called on rank 0 while later stages compute.

        Shapes: the choice has one row.
        """
        if self._transport is not None:
            self._transport.step = self.step_number
        self.readout.sampler.admit(slot, params, input_ids)
        bounds = schedule.chunk_bounds(len(input_ids), self.limits.chunk_size)
        call = self._sections.prompt_call(slot, input_ids, bounds)
        self._execute(call, schedule.prefill(self.topology, self.index, len(bounds)), _PREFILL, host_work)
        self._sections.keep_tails(call, self.step_number)
        self._next_positions[slot] = len(input_ids)
        return self._take_choice(call)

    def step(self, host_work: HostWork | None = None) -> Choice:
        """Decode one token for every active slot on all ranks.

        Args:
            host_work: called on rank 0 while later stages compute.

        Shapes: the choice has one row for each of rows 0 to the last active slot.
        """
        if self._transport is not None:
            self._transport.step = self.step_number
        if self._graphs is None:
            call = self._sections.step_call(self._positions(), self.step_number)
            self._execute(call, self._program(), _STEP, host_work)
            self._sections.push_local(call)
        else:
            call = self._run_graph(self._graphs)
        self._next_positions = {slot: position + 1 for slot, position in self._next_positions.items()}
        self.step_number += 1
        return self._take_choice(call)

    def rest(self) -> None:
        """Complete all hand-offs, so that nothing is in flight."""
        for instruction in schedule.rest(self.topology, self.index, self.step_number, self._first_step):
            self.setup.link.hand_offs_in.take(("step", instruction.step))
        if self._transport is not None:
            self._transport.finish_sends()
            self._transport.wait_for_device("while hand-offs were completed")
        self._first_step = self.step_number

    def retire(self, slots: Sequence[int]) -> None:
        """Free slots."""
        for slot in slots:
            self._next_positions.pop(slot, None)
            self.readout.sampler.retire(slot)

    def on_host(self, choice: Choice) -> Choice:
        """The choice in host memory. Here rank 0 waits for the device.

        Raises:
            TransportError: a peer has ended or does not answer.
        """
        self.pulse.beat(Phase.RECEIVE)
        copied = [None if each is None else _to_host(each) for each in (choice.tokens, choice.logprobs, choice.margins)]
        if self._transport is not None:
            self._transport.wait_for_device("while it waited for the token")
        elif choice.tokens.is_cuda:
            torch.cuda.current_stream().synchronize()
        return Choice(*copied)  # type: ignore[arg-type]  # tokens are there

    def close(self) -> None:
        """Release the CUDA graphs; the stage cannot run afterwards."""
        if self._graphs is not None:
            self._graphs.close()

    @property
    def caches(self) -> dict[int, SectionCache]:
        """Caches of this rank's sections."""
        return self._sections.caches

    @property
    def kv_bytes(self) -> int:
        """Memory of this rank's caches."""
        return sum(cache.kv_bytes for cache in self.caches.values())

    def prompt_memory(self) -> Tensor:
        """Return the memory of this stage's first section in the first step after a prefill into slot 0: [1, 1, H]."""
        assert self._sections.received is not None, "the first stage has no memory"
        return self._sections.received.oldest(1, self.step_number)

    # --- execution ----------------------------------------------------------------------------------------------

    def _positions(self) -> list[int]:
        """Return the position of the next token of each row, up to the last active slot; 0 for unused rows."""
        return [self._next_positions.get(slot, 0) for slot in range(1 + max(self._next_positions))]

    def _program(self) -> tuple[Instruction, ...]:
        """Return the instructions of this step.

        After the first `lag` steps they differ only in the step number, so numbers are relative to `_program_shift`.
        """
        young = min(self.step_number - self._first_step, self.topology.lag)
        if young not in self._programs:
            self._programs[young] = schedule.decode_step(self.topology, self.index, young, 0)
        self._program_shift = self.step_number - young
        return self._programs[young]

    def _execute(
        self, call: Call, program: Iterable[Instruction], methods: "Methods", host_work: HostWork | None
    ) -> None:
        """Run instructions in order."""
        recorder = self._recorder
        for instruction in program:
            kind = instruction.kind
            self.pulse.beat(Phase.RECEIVE if kind in _WAITS else Phase.FORWARD)
            if recorder is None and kind is not Kind.HOST:
                methods[kind](self, call, instruction)
                continue
            with self._span(instruction):
                if kind is not Kind.HOST:
                    methods[kind](self, call, instruction)
                elif host_work is not None:
                    host_work()

    def _run_graph(self, graphs: StepGraphs) -> Call:
        """Run a step up to the logits as one graph, then choose tokens."""
        positions = self._positions()
        self.pulse.beat(Phase.FORWARD)
        call = Call(range(len(positions)), [position + 1 for position in positions], self.step_number)
        with self._span(Instruction(Kind.FINISH, self.step_number)):
            self.readout.logits = graphs.run(positions)
        self._execute(call, (Instruction(Kind.CHOOSE, self.step_number),), _STEP, None)
        return call

    def _take_choice(self, call: Call) -> Choice:
        choice, first = self.readout.choice, call.slots[0]
        self._sections.tokens[first : first + call.rows] = choice.tokens
        return choice

    def _span(self, instruction: Instruction) -> AbstractContextManager[None]:
        if self._recorder is None:
            return _NO_SPAN
        name = instruction.kind.value
        if instruction.kind in (Kind.BEGIN, Kind.FINISH):
            name = f"{name} {instruction.index + 1}"
        return self._recorder.span(name, CATEGORIES[instruction.kind], step=self.step_number)

    def _receive_hand_off(self, call: Call, instruction: Instruction) -> None:
        assert self._sections.received is not None
        step = instruction.step + self._program_shift
        buffer = self._sections.received.of_step(call.rows, step)
        self.setup.link.hand_offs_in.expect(("step", step), buffer)

    def _wait_for_hand_off(self, call: Call, instruction: Instruction) -> None:
        (call.carried,) = self.setup.link.hand_offs_in.take(("step", instruction.step + self._program_shift))

    def _receive_chunk(self, call: Call, instruction: Instruction) -> None:
        assert call.prompt is not None
        begin, end = call.prompt.bounds[instruction.step]
        shape = (1, end - begin, self.model.hidden_size)
        buffer = torch.empty(shape, dtype=self.device.dtype, device=self.device.name)
        self.setup.link.hand_offs_in.expect(("chunk", instruction.step), buffer)

    def _wait_for_chunk(self, call: Call, instruction: Instruction) -> None:
        (call.carried,) = self.setup.link.hand_offs_in.take(("chunk", instruction.step))

    def _send(self, call: Call, in_flight: int) -> None:
        output = call.outputs[self._sections.last].contiguous()
        self.setup.link.hand_offs_out.send(output, in_flight=in_flight)

    def _last_output(self, call: Call) -> Tensor | None:
        """Output of the model's last section at the last position, if this rank has it."""
        output = call.outputs.get(self.topology.num_sections - 1)
        return None if output is None else output[:, -1:]

    def _combine(self, call: Call, instruction: Instruction) -> None:
        outputs = {section: output[:, -1:] for section, output in call.outputs.items()}
        self.readout.combine(outputs, None if instruction.index < 0 else instruction.index)


Methods = Mapping[Kind, Callable[[Stage, Call, Instruction], None]]

_STEP: Methods = {
    Kind.ASK: lambda stage, call, _: stage.readout.ask(call.slots),
    Kind.EXPECT: Stage._receive_hand_off,
    Kind.BEGIN: lambda stage, call, instruction: stage._sections.begin(call, instruction.index),
    Kind.WAIT: Stage._wait_for_hand_off,
    Kind.FINISH: lambda stage, call, instruction: stage._sections.finish(call, instruction.index),
    Kind.SEND: lambda stage, call, _: stage._send(call, stage.topology.lag),
    Kind.COMBINE: Stage._combine,
    Kind.SHARE: lambda stage, call, _: stage.readout.share(stage._last_output(call)),
    Kind.HEAD: lambda stage, call, _: stage.readout.head(stage._last_output(call)),
    Kind.CHOOSE: lambda stage, call, _: stage.readout.choose(call.slots, call.next_positions),
    Kind.PUBLISH: lambda stage, call, _: stage.readout.publish(),
    Kind.TOKEN: lambda stage, call, _: stage.readout.receive(),
}
"""The instructions of a step, except `Kind.HOST`, which `_execute` handles."""

_PREFILL: Methods = {
    **_STEP,
    Kind.EXPECT: Stage._receive_chunk,
    Kind.WAIT: Stage._wait_for_chunk,
    Kind.FINISH: lambda stage, call, chunk: stage._sections.run_chunk(call, chunk.index, chunk.step),
    Kind.SEND: lambda stage, call, _: stage._send(call, 1),
}
"""The instructions of a prefill, whose hand-offs are chunks."""


def _to_host(tensor: Tensor) -> Tensor:
    """Copy to pinned memory without waiting; a CPU tensor is returned unchanged."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
