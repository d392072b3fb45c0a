"""One rank at work: runs the instructions of the schedule over its sections, caches and communicators."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stagdist.decode.layers.cache import SectionCache
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.graphs import StepGraphs
from stagdist.decode.runtime.hosted_sections import Call, StageSections
from stagdist.decode.runtime.readout import Readout
from stagdist.decode.runtime.schedule import Instruction, Kind
from stagdist.decode.runtime.slots import Slots
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampler import Choice
from stagdist.decode.topology import Limits
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
"""What a peer can keep waiting."""


class Stage:
    """Executor of the schedule over this rank's sections; `pulse` tells a watcher what it does.

    Args:
        limits: as the sections were made for; the chunk size may change between prompts.
        readout: from the last hidden states to the token.
        transport: None in a world of one.
        recorder: gets a span for every instruction.
        graphs: runs steps up to the logits (one process); None: instruction by instruction.
    """

    def __init__(
        self,
        sections: StageSections,
        limits: Limits,
        readout: Readout,
        transport: Transport | None = None,
        *,
        recorder: SpanRecorder | None = None,
        graphs: StepGraphs | None = None,
    ):
        self._sections, self.limits, self.readout, self._transport = sections, limits, readout, transport
        self.model, self.topology = sections.model, sections.topology
        self.weights, self.device, self.index = sections.weights, sections.device, sections.index
        self.recorder = recorder
        self.slots = Slots(limits.num_slots)
        self.host_work: Callable[[], None] = lambda: None
        self.pulse = Pulse()
        self.step_number = 0
        self._first_step = 0
        self._programs: dict[int, tuple[Instruction, ...]] = {}
        if self.index > 0:
            shape = (self.topology.buffers, limits.num_slots, 1, self.model.hidden_size)
            self._buffers = torch.zeros(shape, dtype=self.device.dtype, device=self.device.name)
        self._graphs = graphs

    # --- operations, the same on every rank ---------------------------------------------------------------------

    def prefill(self, slot: int, prompt_ids: Sequence[int], params: SamplingParams) -> Choice:
        """Run a prompt into a slot and choose its first token, known to all ranks.

        Shapes: the choice has one row.
        """
        if self._transport is not None:
            self._transport.step = self.step_number
        self.readout.admit(slot, params, prompt_ids)
        length = len(prompt_ids)
        ids = self.device.upload(prompt_ids, torch.int64)
        call = Call([slot], [length])
        memories = self._sections.prompt_memories()
        bounds = schedule.chunk_bounds(length, self.limits.chunk_size)
        for instruction in schedule.prefill(self.topology, self.index, len(bounds)):
            begin, end = bounds[instruction.step] if instruction.kind in _PER_CHUNK else (0, 0)
            self._beat(instruction.kind)
            with self._span(instruction):
                match instruction.kind:
                    case Kind.ASK:
                        self.readout.ask(call.slots)
                    case Kind.EXPECT:
                        shape = (1, end - begin, self.model.hidden_size)
                        buffer = torch.empty(shape, dtype=self.device.dtype, device=self.device.name)
                        self._link.expect(("chunk", instruction.step), buffer)
                    case Kind.WAIT:
                        call.carried = self._link.arrived(("chunk", instruction.step))
                    case Kind.FINISH:
                        self._sections.run_chunk(call, memories, instruction.index, ids[begin:end], begin)
                    case Kind.SEND:
                        self._link.send(call.outputs[self._sections.last], 1)
                    case _:
                        self._end_of_prompt(call)
                        self._end(call, instruction)
        self._sections.keep_tails(slot, self.step_number, memories)
        self.slots.admit(slot, length)
        return self._take_choice(call)

    def step(self) -> Choice:
        """Feed every active slot's token and choose the next ones, known to all ranks.

        Shapes: the choice has one row for each of rows 0 to the last active slot.
        """
        if self._transport is not None:
            self._transport.step = self.step_number
        if self._graphs is None:
            call = self._sections.step_call(self.slots.positions(), self.step_number)
            self._run_step(call)
            self._sections.push_local(call)
        else:
            call = self._run_graph(self._graphs)
        self.slots.advance()
        self.step_number += 1
        return self._take_choice(call)

    def rest(self) -> None:
        """Bring all hand-offs to rest: nothing is in flight afterwards."""
        for instruction in schedule.rest(self.topology, self.index, self.step_number, self._first_step):
            self._link.arrived(("step", instruction.step))
        if self._transport is not None:
            self._transport.finish_sends()
            self._transport.wait_for_device("while hand-offs came to rest")
        self._first_step = self.step_number

    def retire(self, slots: Sequence[int]) -> None:
        """Free slots."""
        self.slots.retire(slots)
        for slot in slots:
            self.readout.retire(slot)

    def on_host(self, choice: Choice) -> Choice:
        """The choice in host memory. Here rank 0 waits for the device.

        Raises:
            TransportError: a peer is gone or silent.
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
        """What this stage's first section looks at newly in the first step after a prefill into slot 0.

        Shapes: [1, 1, H].
        """
        return self._sections.young_memory(1, self.step_number)[:, None]

    # --- steps --------------------------------------------------------------------------------------------------

    def _program(self) -> tuple[tuple[Instruction, ...], int]:
        """The instructions of this step, and what their step numbers are short of.

        Once all hand-offs have something to wait for, every step is the same but for its number.
        """
        young = min(self.step_number - self._first_step, self.topology.lag)
        if young not in self._programs:
            self._programs[young] = schedule.decode_step(self.topology, self.index, young, 0)
        return self._programs[young], self.step_number - young

    def _run_step(self, call: Call) -> None:
        program, shift = self._program()
        if self.recorder is None:
            for instruction in program:
                self._run(call, instruction, shift)
            return
        for instruction in program:
            with self._span(instruction):
                self._run(call, instruction, shift)

    def _run(self, call: Call, instruction: Instruction, shift: int) -> None:
        """One instruction of a step."""
        kind = instruction.kind
        self._beat(kind)
        if kind is Kind.BEGIN:
            self._sections.begin(call, instruction.index)
        elif kind is Kind.FINISH:
            self._sections.finish(call, instruction.index)
        elif kind is Kind.ASK:
            self.readout.ask(call.slots)
        elif kind is Kind.EXPECT:
            step = instruction.step + shift
            self._link.expect(("step", step), self._buffers[step % self.topology.buffers, : call.rows])
        elif kind is Kind.WAIT:
            call.carried = self._link.arrived(("step", instruction.step + shift))
        elif kind is Kind.SEND:
            self._link.send(call.outputs[self._sections.last], self.topology.lag)
        else:
            self._end(call, instruction)

    def _run_graph(self, graphs: StepGraphs) -> Call:
        """A step up to the logits as one graph; the choice follows on its own."""
        positions = self.slots.positions()
        self._beat(Kind.FINISH)
        call = self._sections.bare_call(positions, self.step_number)
        with self._span(Instruction(Kind.FINISH, self.step_number)):
            self.readout.logits = graphs.run(positions)
        choose = Instruction(Kind.CHOOSE, self.step_number)
        with self._span(choose):
            self._end(call, choose)
        return call

    # --- from the last section to the token ---------------------------------------------------------------------

    def _end_of_prompt(self, call: Call) -> None:
        """Of a prompt only the last position's output is read."""
        call.outputs = {section: output[:, -1:] for section, output in call.outputs.items()}

    def _end(self, call: Call, instruction: Instruction) -> None:
        readout = self.readout
        last_output = call.outputs.get(self.topology.num_sections - 1)
        match instruction.kind:
            case Kind.COMBINE:
                readout.combine(call.outputs, None if instruction.index < 0 else instruction.index)
            case Kind.SHARE:
                readout.share(last_output)
            case Kind.HEAD:
                readout.head(last_output)
            case Kind.CHOOSE:
                readout.choose(call.slots, call.next_positions)
            case Kind.PUBLISH:
                readout.publish(call.slots)
            case Kind.TOKEN:
                readout.receive(call.slots)
            case Kind.HOST:
                self.host_work()
            case kind:
                raise AssertionError(f"{kind} is no end of a step")

    def _take_choice(self, call: Call) -> Choice:
        choice, first = self.readout.choice, call.slots[0]
        self._sections.tokens[first : first + call.rows] = choice.tokens
        return choice

    # --- time ---------------------------------------------------------------------------------------------------

    @property
    def _link(self) -> Transport:
        assert self._transport is not None, "a hand-off between stages in a world of one"
        return self._transport

    def _beat(self, kind: Kind) -> None:
        self.pulse.beat(Phase.RECEIVE if kind in _WAITS else Phase.FORWARD)

    def _span(self, instruction: Instruction):  # type: ignore[no-untyped-def]
        if self.recorder is None:
            return _NOTHING
        name = instruction.kind.value
        if instruction.kind in (Kind.BEGIN, Kind.FINISH):
            name = f"{name} {instruction.index + 1}"
        return self.recorder.span(name, CATEGORIES[instruction.kind], step=self.step_number)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, there when the device has come to it; on a CPU the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_NOTHING = _Nothing()
_PER_CHUNK = {Kind.EXPECT, Kind.WAIT, Kind.FINISH, Kind.SEND}
