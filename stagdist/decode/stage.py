"""One rank at work: runs the instructions of the schedule over its sections, caches and communicators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.config import ModelConfig
from stagdist.decode import schedule
from stagdist.decode.batched import BatchedSections
from stagdist.decode.cache import SectionCache
from stagdist.decode.control import Slots
from stagdist.decode.graphs import SectionStreams, StepGraphs
from stagdist.decode.handoff import LocalHandOff, PromptMemory, Tails
from stagdist.decode.place import Angles, ChunkPlace, Place, StepPlace, step_place
from stagdist.decode.readout import Readout
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampler import Choice
from stagdist.decode.schedule import Instruction, Kind
from stagdist.decode.section import Lap, LayerMath, SectionRunner
from stagdist.decode.topology import Topology
from stagdist.decode.transport import Transport
from stagdist.decode.weights import Device, StageWeights
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


@dataclass(frozen=True)
class Limits:
    """Sizes that are fixed when an engine starts.

    Attributes:
        num_slots: requests decoded together.
        max_context: positions of a request.
        chunk_size: positions of a prefill chunk.
    """

    num_slots: int
    max_context: int
    chunk_size: int


@dataclass
class _Call:
    """What one run of a schedule works on."""

    rows: int
    slots: Sequence[int]
    next_positions: Sequence[int]  # of the tokens being chosen
    place: Place | None = None
    wide: Place | None = None  # of all sections' rows, where they are one batch
    begun: Tensor | None = None
    carried: Tensor | None = None  # from the stage before
    outputs: dict[int, Tensor] = field(default_factory=dict)
    embedded: Tensor | None = None
    null_rows: Tensor | None = None


class Stage:
    """This rank's sections with their caches, and the executor of their schedule.

    Args:
        weights: this rank's.
        readout: from the last hidden states to the token.
        transport: None in a world of one.
        recorder: gets a span for every instruction.
        lap: told when a phase inside a section ends.
        graphs: run steps as CUDA graphs (one process).
    """

    def __init__(
        self,
        model: ModelConfig,
        topology: Topology,
        weights: StageWeights,
        limits: Limits,
        device: Device,
        readout: Readout,
        transport: Transport | None = None,
        *,
        recorder: SpanRecorder | None = None,
        lap: Lap | None = None,
        graphs: bool = False,
    ):
        self.model, self.topology, self.weights, self.limits, self.device = model, topology, weights, limits, device
        self.index = 0 if transport is None else transport.stage
        self.slots = Slots(limits.num_slots)
        self.tokens = torch.zeros(limits.num_slots, dtype=torch.int64, device=device.name)
        self.readout = readout
        self.recorder = recorder
        self.host_work: Callable[[], None] = lambda: None
        self.step_number = 0
        self._first_step = 0
        self._transport = transport
        self._programs: dict[int, tuple[Instruction, ...]] = {}
        self._angles = Angles(model, device)
        self._build_sections(lap)
        self._build_hand_offs()
        self._streams = SectionStreams(device.name, list(weights.sections))
        self._graphs: StepGraphs | None = None
        if graphs:
            self._graphs = StepGraphs(self._fixed_step, self._carried_state, device.name, limits.max_context)

    # --- operations, the same on every rank ---------------------------------------------------------------------

    def prefill(self, slot: int, prompt_ids: Sequence[int], params: SamplingParams) -> Choice:
        """Run a prompt into a slot and choose its first token, known to all ranks.

        Shapes: the choice has one row.
        """
        self.readout.admit(slot, params, prompt_ids)
        length = len(prompt_ids)
        ids = torch.tensor(prompt_ids, device=self.device.name)
        call = _Call(1, [slot], [length])
        memories = {section: PromptMemory(self.topology.lag) for section in self.topology.sections(self.index)}
        bounds = schedule.chunk_bounds(length, self.limits.chunk_size, self.topology.num_stages)
        for instruction in schedule.prefill(self.topology, self.index, len(bounds)):
            begin, end = bounds[instruction.step] if instruction.kind in _PER_CHUNK else (0, 0)
            with self._span(instruction):
                match instruction.kind:
                    case Kind.EXPECT:
                        buffer = self._empty(1, end - begin)
                        self._link.expect(("chunk", instruction.step), buffer)
                    case Kind.WAIT:
                        call.carried = self._link.arrived(("chunk", instruction.step))
                    case Kind.FINISH:
                        place = ChunkPlace(self._angles, slot, begin, end - begin)
                        self._run_chunk(call, memories, instruction.index, ids[begin:end], place)
                    case Kind.SEND:
                        self._link.send(call.outputs[self._last_section], 1)
                    case Kind.ASK:
                        self.readout.ask(call.slots)
                    case _:
                        self._end_of_prompt(call)
                        self._finish(call, instruction)
        self._keep_tails(slot, memories)
        self.slots.admit(slot, length)
        return self._take_choice(call)

    def step(self) -> Choice:
        """Feed every active slot's token and choose the next ones, known to all ranks.

        Shapes: the choice has one row for each of rows 0 to the last active slot.
        """
        positions = self.slots.positions()
        call = _Call(len(positions), range(len(positions)), [position + 1 for position in positions])
        if self._transport is not None:
            self._transport.step = self.step_number
        program, shift = self._program()
        if self._graphs is not None:
            with self._span(_GRAPH):
                self.readout.logits = self._graphs.run(positions)
            program = tuple(instruction for instruction in program if instruction.kind is Kind.CHOOSE)
        else:
            call.place = step_place(self._angles, positions)
            if self._batched is not None:
                call.wide = step_place(self._angles, positions, self._batched.count)
            call.null_rows = self._null_rows(positions)
        for instruction in program:
            with self._span(instruction):
                match instruction.kind:
                    case Kind.ASK:
                        self.readout.ask(call.slots)
                    case Kind.EXPECT:
                        step = instruction.step + shift
                        self._link.expect(("step", step), self._buffer(step, call.rows))
                    case Kind.BEGIN:
                        call.begun = self._begin(call, instruction.index)
                    case Kind.WAIT:
                        call.carried = self._link.arrived(("step", instruction.step + shift))
                    case Kind.FINISH:
                        self._finish_section(call, instruction.index)
                    case Kind.SEND:
                        self._link.send(call.outputs[self._last_section], self.topology.lag)
                    case _:
                        self._finish(call, instruction)
        if self._graphs is None:
            self._push_local(call)
        self.slots.advance()
        self.step_number += 1
        return self._take_choice(call)

    def rest(self) -> None:
        """Bring all hand-offs to rest: nothing is in flight afterwards."""
        for instruction in schedule.rest(self.topology, self.index, self.step_number, self._first_step):
            self._link.arrived(("step", instruction.step))
        if self._transport is not None:
            self._transport.finish_sends()
        self._first_step = self.step_number

    def retire(self, slots: Sequence[int]) -> None:
        """Free slots."""
        self.slots.retire(slots)
        for slot in slots:
            self.readout.retire(slot)

    @property
    def kv_bytes(self) -> int:
        """Memory of this rank's caches."""
        return sum(cache.kv_bytes for cache in self._caches.values())

    @property
    def caches(self) -> dict[int, SectionCache]:
        """Caches of this rank's sections."""
        return self._caches

    def prompt_memory(self) -> Tensor:
        """What this stage's first section looks at newly in the first step after a prefill into slot 0.

        Shapes: [1, 1, H].
        """
        return self._tails.merge(1, self.step_number, None)[:, None]

    def _fixed_step(self, positions: Tensor, reach: int) -> Tensor:
        """A step up to the logits with shapes that depend on nothing but the arguments, for a graph.

        Shapes: positions int64 [B] on the device -> logits [B, V].
        """
        call = _Call(len(positions), range(len(positions)), ())
        call.place = StepPlace(self._angles, positions, reach)
        if self._batched is not None:
            call.wide = StepPlace(self._angles, positions, reach, repeats=self._batched.count)
        if self.topology.staggered and self.topology.lag:
            call.null_rows = (positions < self.topology.lag)[:, None]
        program, _ = self._program()
        call.embedded = self._embed(self.tokens[: call.rows, None])
        for instruction in program:
            match instruction.kind:
                case Kind.BEGIN:
                    self._need_earlier(instruction.index)
                    with self._streams.of(instruction.index):
                        call.begun = self._begin(call, instruction.index)
                case Kind.FINISH:
                    with self._streams.of(instruction.index):
                        self._finish_section(call, instruction.index)
                case Kind.COMBINE | Kind.HEAD:
                    self._streams.join()
                    self._finish(call, instruction)
        self._push_local(call)
        assert self.readout.logits is not None
        return self.readout.logits

    def _need_earlier(self, section: int) -> None:
        """Without a lag a section reads what the one before makes in the same step."""
        if self.topology.lag == 0:
            self._streams.join()

    def _program(self) -> tuple[tuple[Instruction, ...], int]:
        """The instructions of this step, and what their step numbers are short of.

        Once all hand-offs have something to wait for, every step is the same but for its number.
        """
        young = min(self.step_number - self._first_step, self.topology.lag)
        if young not in self._programs:
            self._programs[young] = schedule.decode_step(self.topology, self.index, young, 0)
        return self._programs[young], self.step_number - young

    # --- sections -----------------------------------------------------------------------------------------------

    def _build_sections(self, lap: Lap | None) -> None:
        model, tensor = self.model, 1 if self._transport is None else self._transport.grid.tensor
        math = LayerMath(model, tensor, None if self._transport is None else self._transport.tensor_sum())
        self._caches: dict[int, SectionCache] = {}
        for section in self.weights.sections:
            self._caches[section] = SectionCache(
                model,
                model.section_layers[section],
                has_memory=model.staggered and section > 0,
                num_slots=self.limits.num_slots,
                capacity=self.limits.max_context,
                tensor_size=tensor,
                device=self.device,
            )
        self._batched = (
            BatchedSections(math, self.weights.sections, self._caches, lap) if self.topology.batched else None
        )
        self._runners = {
            section: SectionRunner(math, weights, self._caches[section], lap)
            for section, weights in self.weights.sections.items()
        }
        self._last_section = self.topology.sections(self.index)[-1]

    def _embed(self, ids: Tensor) -> Tensor:
        assert self.weights.embedding is not None, "a stage without embedding was given tokens"
        return F.embedding(ids, self.weights.embedding)

    def _begin(self, call: _Call, section: int) -> Tensor:
        assert call.place is not None
        if self.topology.staggered or section == 0:
            if call.embedded is None:
                call.embedded = self._embed(self.tokens[: call.rows, None])
            hidden = call.embedded
        else:
            stream = call.outputs.get(section - 1, call.carried)
            assert stream is not None
            hidden = stream
        if self._batched is not None:
            assert call.wide is not None
            return self._batched.begin(hidden, call.wide)
        return self._runners[section].begin(hidden, call.place)

    def _finish_section(self, call: _Call, section: int) -> None:
        assert call.place is not None and call.begun is not None
        if self._batched is not None:
            previous = [self._local[later].oldest(call.rows)[:, None] for later in sorted(self._local)]
            assert call.wide is not None
            call.outputs = self._batched.finish(call.begun, call.wide, call.place, previous, call.null_rows)
            return
        previous_output = self._previous(call, section)
        call.outputs[section] = self._runners[section].finish(call.begun, call.place, previous_output, call.null_rows)

    def _previous(self, call: _Call, section: int) -> Tensor | None:
        """What a section's rows look at newly in this step. Shapes: [B, 1, H]."""
        if section == 0 or not self.topology.staggered:
            return None
        if section in self._local:
            return self._local[section].oldest(call.rows)[:, None]
        if self.topology.lag == 0:
            return call.outputs.get(section - 1, call.carried)
        carried = None if call.carried is None else call.carried[:, 0]
        return self._tails.merge(call.rows, self.step_number, carried)[:, None]

    def _run_chunk(
        self, call: _Call, memories: dict[int, PromptMemory], section: int, ids: Tensor, place: ChunkPlace
    ) -> None:
        """One section over one chunk of a prompt."""
        before = call.outputs.get(section - 1, call.carried)
        previous = null_rows = None
        if self.topology.staggered and section > 0:
            assert before is not None
            previous = memories[section].shift(before)
            null_rows = self._null_rows(place.positions)
            null_rows = None if null_rows is None else null_rows.T
        hidden = before if before is not None and not self.topology.staggered else self._embed(ids[None])
        runner = self._runners[section]
        call.outputs[section] = runner.finish(runner.begin(hidden, place), place, previous, null_rows)

    def _null_rows(self, positions: Sequence[int]) -> Tensor | None:
        """Where the null vector stands for a memory that does not exist. Shapes: bool [len(positions), 1]."""
        if not self.topology.staggered or all(position >= self.topology.lag for position in positions):
            return None
        rows = [[position < self.topology.lag] for position in positions]
        return torch.tensor(rows, device=self.device.name)

    # --- hand-offs ----------------------------------------------------------------------------------------------

    def _build_hand_offs(self) -> None:
        topology, limits, hidden = self.topology, self.limits, self.model.hidden_size
        sections = topology.sections(self.index)
        self._tails = Tails(topology.lag)
        self._local: dict[int, LocalHandOff] = {}
        if topology.lag:
            inside = range(sections.start + 1, sections.stop)
            self._local = {s: LocalHandOff(topology.lag, limits.num_slots, hidden, self.device) for s in inside}
        if self.index > 0:
            shape = (topology.buffers, limits.num_slots, 1, hidden)
            self._buffers = torch.zeros(shape, dtype=self.device.dtype, device=self.device.name)

    def _buffer(self, step: int, rows: int) -> Tensor:
        return self._buffers[step % self.topology.buffers, :rows]

    def _empty(self, rows: int, length: int) -> Tensor:
        shape = (rows, length, self.model.hidden_size)
        return torch.empty(shape, dtype=self.device.dtype, device=self.device.name)

    def _keep_tails(self, slot: int, memories: dict[int, PromptMemory]) -> None:
        """The last rows of a prompt are the first hand-offs of its request."""
        if not self.topology.lag:
            return
        for section, memory in memories.items():
            if section in self._local:
                self._local[section].fill(slot, memory.tail)
            elif section > 0:
                self._tails.fill(slot, self.step_number, memory.tail)

    def _carried_state(self) -> list[Tensor]:
        """What a step changes besides cache entries that it writes again."""
        return [hand_off.register for hand_off in self._local.values()]

    def _push_local(self, call: _Call) -> None:
        for section, hand_off in self._local.items():
            source = section if self.topology.recurrent else section - 1
            hand_off.push(call.outputs[source][:, 0])

    # --- from the last section to the token ---------------------------------------------------------------------

    def _end_of_prompt(self, call: _Call) -> None:
        """Of a prompt only the last position's output is read."""
        call.outputs = {section: output[:, -1:] for section, output in call.outputs.items()}

    def _finish(self, call: _Call, instruction: Instruction) -> None:
        readout = self.readout
        match instruction.kind:
            case Kind.COMBINE:
                readout.combine(call.outputs, None if instruction.index < 0 else instruction.index)
            case Kind.SHARE:
                readout.share(call.outputs.get(self.topology.num_sections - 1))
            case Kind.HEAD:
                readout.head(call.outputs.get(self.topology.num_sections - 1))
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

    def _take_choice(self, call: _Call) -> Choice:
        choice = self.readout.choice
        for row, slot in enumerate(call.slots) if call.rows == 1 else ():
            self.tokens[slot] = choice.tokens[row]
        if call.rows > 1:
            self.tokens[: call.rows] = choice.tokens
        return choice

    # --- time ---------------------------------------------------------------------------------------------------

    @property
    def _link(self) -> Transport:
        assert self._transport is not None, "a hand-off between stages in a world of one"
        return self._transport

    def _span(self, instruction: Instruction):  # type: ignore[no-untyped-def]
        if self.recorder is None:
            return _NOTHING
        name = instruction.kind.value
        if instruction.kind in (Kind.BEGIN, Kind.FINISH):
            name = f"{name} {instruction.index + 1}"
        return self.recorder.span(name, CATEGORIES[instruction.kind], step=self.step_number)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_GRAPH = Instruction(Kind.FINISH, 0)
_NOTHING = _Nothing()
_PER_CHUNK = {Kind.EXPECT, Kind.WAIT, Kind.FINISH, Kind.SEND}
