"""The executor: runs the instructions of the schedule over a rank's sections, caches and communicators."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stagdist.decode.layers.cache import SectionCache
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.graphs import StepGraphs
from stagdist.decode.runtime.hosted_sections import Call, StageSections
from stagdist.decode.runtime.readout import Readout
from stagdist.decode.runtime.schedule import Instruction, Kind
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.runtime.slots import Slots
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
"""Instructions during which a peer can keep this rank waiting."""

HostWork = Callable[[], None]


class Stage:
    """Executor of the schedule on one rank.

    Args:
        recorder: gets a span for every instruction.
        pulse: shows a watcher what this rank does.
        graphs: runs steps up to the logits (one process); None: instruction by instruction.
    """

    def __init__(
        self,
        setup: StageSetup,
        sections: StageSections,
        readout: Readout,
        *,
        recorder: SpanRecorder | None = None,
        pulse: Pulse | None = None,
        graphs: StepGraphs | None = None,
    ):
        self.setup, self.readout, self._sections, self._recorder, self._graphs = (
            setup, readout, sections, recorder, graphs,
        )  # fmt: skip
        self.model, self.topology, self.limits = setup.model, setup.topology, setup.limits
        self.weights, self.device, self.index = setup.weights, setup.device, setup.index
        self._transport = setup.transport
        self.slots = Slots(setup.limits.num_slots)
        self.pulse = pulse or Pulse()
        self.step_number = 0
        self._first_step = 0
        self._programs: dict[int, tuple[Instruction, ...]] = {}
        if self.index > 0:
            shape = (self.topology.buffers, setup.limits.num_slots, 1, self.model.hidden_size)
            self._buffers = torch.zeros(shape, dtype=self.device.dtype, device=self.device.name)

    # --- operations, the same on every rank ---------------------------------------------------------------------

    def prefill(
        self, slot: int, input_ids: Sequence[int], params: SamplingParams, host_work: HostWork | None = None
    ) -> Choice:
        """Run a prompt into a slot and choose its first token, known to all ranks.

        Args:
            host_work: called while later stages compute; rank 0's.

        Shapes: the choice has one row.
        """
        if self._transport is not None:
            self._transport.step = self.step_number
        self.readout.admit(slot, params, input_ids)
        bounds = schedule.chunk_bounds(len(input_ids), self.limits.chunk_size)
        call = self._sections.prompt_call(slot, input_ids, bounds)
        self._execute(call, schedule.prefill(self.topology, self.index, len(bounds)), _PREFILL, host_work)
        self._sections.keep_tails(call, self.step_number)
        self.slots.admit(slot, len(input_ids))
        return self._take_choice(call)

    def step(self, host_work: HostWork | None = None) -> Choice:
        """Feed every active slot's token and choose the next ones, known to all ranks.

        Args:
            host_work: called while later stages compute; rank 0's.

        Shapes: the choice has one row for each of rows 0 to the last active slot.
        """
        if self._transport is not None:
            self._transport.step = self.step_number
        if self._graphs is None:
            call = self._sections.step_call(self.slots.positions(), self.step_number)
            self._execute(call, self._program(), _STEP, host_work)
            self._sections.push_local(call)
        else:
            call = self._run_graph(self._graphs)
        self.slots.advance()
        self.step_number += 1
        return self._take_choice(call)

    def rest(self) -> None:
        """Complete all hand-offs: nothing is in flight afterwards."""
        for instruction in schedule.rest(self.topology, self.index, self.step_number, self._first_step):
            self.setup.link.arrived(("step", instruction.step))
        if self._transport is not None:
            self._transport.finish_sends()
            self._transport.wait_for_device("while hand-offs were completed")
        self._first_step = self.step_number

    def retire(self, slots: Sequence[int]) -> None:
        """Free slots."""
        self.slots.retire(slots)
        for slot in slots:
            self.readout.retire(slot)

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
        self.readout.logits = None

    # --- what it holds ------------------------------------------------------------------------------------------

    @property
    def caches(self) -> dict[int, SectionCache]:
        """Caches of this rank's sections."""
        return self._sections.caches

    @property
    def kv_bytes(self) -> int:
        """Memory of this rank's caches."""
        return sum(cache.kv_bytes for cache in self.caches.values())

    def prompt_memory(self) -> Tensor:
        """The memory row that this stage's first section adds in the first step after a prefill into slot 0.

        Shapes: [1, 1, H].
        """
        return self._sections.young_memory(1, self.step_number)[:, None]

    # --- execution ----------------------------------------------------------------------------------------------

    def _program(self) -> tuple[Instruction, ...]:
        """The instructions of this step.

        Once all hand-offs have something to wait for, every step is the same except for its number: the numbers in the
        instructions are relative to `_program_shift`.
        """
        young = min(self.step_number - self._first_step, self.topology.lag)
        if young not in self._programs:
            self._programs[young] = schedule.decode_step(self.topology, self.index, young, 0)
        self._program_shift = self.step_number - young
        return self._programs[young]

    def _execute(
        self, call: Call, program: Iterable[Instruction], methods: "Methods", host_work: HostWork | None
    ) -> None:
        """The one loop over instructions."""
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
        """A step up to the logits as one graph, then the choice."""
        positions = self.slots.positions()
        self.pulse.beat(Phase.FORWARD)
        call = self._sections.bare_call(positions, self.step_number)
        with self._span(Instruction(Kind.FINISH, self.step_number)):
            self.readout.logits = graphs.run(positions)
        self._execute(call, (Instruction(Kind.CHOOSE, self.step_number),), _STEP, None)
        return call

    def _take_choice(self, call: Call) -> Choice:
        choice, first = self.readout.choice, call.slots[0]
        self._sections.tokens[first : first + call.rows] = choice.tokens
        return choice

    def _span(self, instruction: Instruction):  # type: ignore[no-untyped-def]
        if self._recorder is None:
            return _NOTHING
        name = instruction.kind.value
        if instruction.kind in (Kind.BEGIN, Kind.FINISH):
            name = f"{name} {instruction.index + 1}"
        return self._recorder.span(name, CATEGORIES[instruction.kind], step=self.step_number)

    # --- instructions of a step ---------------------------------------------------------------------------------

    def _begin(self, call: Call, instruction: Instruction) -> None:
        self._sections.begin(call, instruction.index)

    def _finish(self, call: Call, instruction: Instruction) -> None:
        self._sections.finish(call, instruction.index)

    def _expect(self, call: Call, instruction: Instruction) -> None:
        step = instruction.step + self._program_shift
        self.setup.link.expect(("step", step), self._buffers[step % self.topology.buffers, : call.rows])

    def _wait(self, call: Call, instruction: Instruction) -> None:
        call.carried = self.setup.link.arrived(("step", instruction.step + self._program_shift))

    def _send(self, call: Call, instruction: Instruction) -> None:
        self.setup.link.send(call.outputs[self._sections.last], self.topology.lag)

    # --- instructions of a prefill ------------------------------------------------------------------------------

    def _finish_chunk(self, call: Call, instruction: Instruction) -> None:
        self._sections.run_chunk(call, instruction.index, instruction.step)

    def _expect_chunk(self, call: Call, instruction: Instruction) -> None:
        assert call.prompt is not None
        begin, end = call.prompt.bounds[instruction.step]
        shape = (1, end - begin, self.model.hidden_size)
        buffer = torch.empty(shape, dtype=self.device.dtype, device=self.device.name)
        self.setup.link.expect(("chunk", instruction.step), buffer)

    def _wait_for_chunk(self, call: Call, instruction: Instruction) -> None:
        call.carried = self.setup.link.arrived(("chunk", instruction.step))

    def _send_chunk(self, call: Call, instruction: Instruction) -> None:
        self.setup.link.send(call.outputs[self._sections.last], 1)

    # --- instructions from the last section to the token --------------------------------------------------------

    def _last_output(self, call: Call) -> Tensor | None:
        """Output of the model's last section at the last position, if this rank has it."""
        output = call.outputs.get(self.topology.num_sections - 1)
        return None if output is None else output[:, -1:]

    def _ask(self, call: Call, instruction: Instruction) -> None:
        self.readout.ask(call.slots)

    def _combine(self, call: Call, instruction: Instruction) -> None:
        outputs = {section: output[:, -1:] for section, output in call.outputs.items()}
        self.readout.combine(outputs, None if instruction.index < 0 else instruction.index)

    def _share(self, call: Call, instruction: Instruction) -> None:
        self.readout.share(self._last_output(call))

    def _head(self, call: Call, instruction: Instruction) -> None:
        self.readout.head(self._last_output(call))

    def _choose(self, call: Call, instruction: Instruction) -> None:
        self.readout.choose(call.slots, call.next_positions)

    def _publish(self, call: Call, instruction: Instruction) -> None:
        self.readout.publish(call.slots)

    def _token(self, call: Call, instruction: Instruction) -> None:
        self.readout.receive(call.slots)


Methods = Mapping[Kind, Callable[[Stage, Call, Instruction], None]]

_STEP: Methods = {
    Kind.ASK: Stage._ask,
    Kind.EXPECT: Stage._expect,
    Kind.BEGIN: Stage._begin,
    Kind.WAIT: Stage._wait,
    Kind.FINISH: Stage._finish,
    Kind.SEND: Stage._send,
    Kind.COMBINE: Stage._combine,
    Kind.SHARE: Stage._share,
    Kind.HEAD: Stage._head,
    Kind.CHOOSE: Stage._choose,
    Kind.PUBLISH: Stage._publish,
    Kind.TOKEN: Stage._token,
}
"""What executes each kind of instruction in a step; `Kind.HOST` is the caller's."""

_PREFILL: Methods = {
    **_STEP,
    Kind.EXPECT: Stage._expect_chunk,
    Kind.WAIT: Stage._wait_for_chunk,
    Kind.FINISH: Stage._finish_chunk,
    Kind.SEND: Stage._send_chunk,
}
"""The same in a prefill, whose hand-offs are chunks."""


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, complete when the device has executed it; on a CPU the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_NOTHING = _Nothing()
