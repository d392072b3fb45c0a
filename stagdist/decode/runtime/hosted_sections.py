"""This rank's sections at work: which rows, which positions, and what each section sees of the one before."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.batched import BatchedSections
from stagdist.decode.layers.cache import SectionCache
from stagdist.decode.layers.rows import Angles, ChunkPlace, Place, StepPlace, step_place
from stagdist.decode.layers.runner import Lap, LayerMath, SectionRunner
from stagdist.decode.layers.weights import Device, StageWeights
from stagdist.decode.runtime.hand_off import LocalHandOff, PromptMemory, Tails
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.topology import Limits, Topology


@dataclass
class Call:
    """What one run of a schedule works on.

    Attributes:
        slots: of the rows.
        next_positions: of the tokens being chosen.
        step: number of the decode step.
        place: of the rows in the caches.
        wide: of all sections' rows, where they are one batch.
        embedded: token embeddings [B, 1, H], once some section asked for them.
        begun: [B, 1, H], between the two halves of a section.
        carried: [B, S, H] from the stage before.
        outputs: [B, S, H] by section.
        null_rows: bool [B, 1], where the null vector stands for a memory that does not exist.
    """

    slots: Sequence[int]
    next_positions: Sequence[int]
    step: int = 0
    place: Place | None = None
    wide: Place | None = None
    embedded: Tensor | None = None
    begun: Tensor | None = None
    carried: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    null_rows: Tensor | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.slots)


class StageSections:
    """Weights, caches and hand-offs of the sections of one rank; knows nothing of schedules.

    Args:
        weights: this rank's.
        transport: tells the stage and sums over tensor ranks; None in a world of one.
        lap: told when a phase inside a section ends.

    Attributes:
        index: the stage.
        tokens: int64 [slots], the token that each slot feeds next; read at every step.
    """

    def __init__(
        self,
        model: ModelConfig,
        topology: Topology,
        weights: StageWeights,
        limits: Limits,
        device: Device,
        transport: Transport | None = None,
        lap: Lap | None = None,
    ):
        self.model, self.topology, self.weights, self.device = model, topology, weights, device
        self.index = 0 if transport is None else transport.stage
        self.tokens = torch.zeros(limits.num_slots, dtype=torch.int64, device=device.name)
        self._angles = Angles(model, device)
        tensor = 1 if transport is None else transport.grid.tensor
        math = LayerMath(model, tensor, None if transport is None else transport.tensor_sum())
        self.caches: dict[int, SectionCache] = {}
        for section in weights.sections:
            self.caches[section] = SectionCache(
                model,
                model.section_layers[section],
                has_memory=model.staggered and section > 0,
                num_slots=limits.num_slots,
                capacity=limits.max_context,
                tensor_size=tensor,
                device=device,
            )
        self._batched: BatchedSections | None = None
        if topology.batched:
            self._batched = BatchedSections(math, weights.sections, self.caches, lap)
        self._runners = {
            section: SectionRunner(math, of_section, self.caches[section], lap)
            for section, of_section in weights.sections.items()
        }
        sections = topology.sections(self.index)
        self.last = sections[-1]
        self._tails = Tails(topology.lag)
        self._local: dict[int, LocalHandOff] = {}
        if topology.lag:
            inside = range(sections.start + 1, sections.stop)
            self._local = {
                section: LocalHandOff(topology.lag, limits.num_slots, model.hidden_size, device) for section in inside
            }

    # --- steps --------------------------------------------------------------------------------------------------

    def step_call(self, positions: Sequence[int], step: int) -> Call:
        """A step of rows 0 to len(positions) - 1."""
        call = self.bare_call(positions, step)
        call.place = step_place(self._angles, positions, self.device)
        if self._batched is not None:
            call.wide = step_place(self._angles, positions, self.device, self._batched.count)
        call.null_rows = self._null_rows(positions)
        return call

    def bare_call(self, positions: Sequence[int], step: int) -> Call:
        """A step whose sections run elsewhere, in a graph."""
        return Call(range(len(positions)), [position + 1 for position in positions], step)

    def fixed_call(self, positions: Tensor, reach: int) -> Call:
        """A step whose shapes depend on nothing but the arguments. Shapes: positions int64 [B], on the device."""
        call = Call(range(len(positions)), ())
        call.place = StepPlace(self._angles, positions, reach)
        if self._batched is not None:
            call.wide = StepPlace(self._angles, positions, reach, repeats=self._batched.count)
        if self.topology.staggered and self.topology.lag:
            call.null_rows = (positions < self.topology.lag)[:, None]
        call.embedded = self._embed(self.tokens[: call.rows, None])
        return call

    def begin(self, call: Call, section: int) -> None:
        """The first self-attention of a section (of all, where they are one batch)."""
        assert call.place is not None
        if self.topology.staggered or section == 0:
            if call.embedded is None:
                call.embedded = self._embed(self.tokens[: call.rows, None])
            hidden = call.embedded
        else:
            stream = call.outputs.get(section - 1, call.carried)
            assert stream is not None
            hidden = stream
        if self._batched is None:
            call.begun = self._runners[section].begin(hidden, call.place)
        else:
            assert call.wide is not None
            call.begun = self._batched.begin(hidden, call.wide)

    def finish(self, call: Call, section: int) -> None:
        """The rest of a section; its output joins `call.outputs`."""
        assert call.place is not None and call.begun is not None
        if self._batched is None:
            previous = self._previous(call, section)
            call.outputs[section] = self._runners[section].finish(call.begun, call.place, previous, call.null_rows)
        else:
            assert call.wide is not None
            memories = [self._local[later].oldest(call.rows)[:, None] for later in sorted(self._local)]
            call.outputs = self._batched.finish(call.begun, call.wide, call.place, memories, call.null_rows)

    def push_local(self, call: Call) -> None:
        """Hand the outputs of a step on between the sections of this rank, after all have run."""
        for section, hand_off in self._local.items():
            source = section if self.topology.recurrent else section - 1
            hand_off.push(call.outputs[source][:, 0])

    # --- prompts ------------------------------------------------------------------------------------------------

    def prompt_memories(self) -> dict[int, PromptMemory]:
        """A shifter of outputs for each section."""
        return {section: PromptMemory(self.topology.lag) for section in self.weights.sections}

    def run_chunk(self, call: Call, memories: dict[int, PromptMemory], section: int, ids: Tensor, start: int) -> None:
        """One section over one chunk of a prompt. Shapes: ids int64 [S], whose first stands at `start`."""
        place = ChunkPlace(self._angles, call.slots[0], start, len(ids))
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

    def keep_tails(self, slot: int, first_step: int, memories: dict[int, PromptMemory]) -> None:
        """The last rows of a prompt are the first hand-offs of its request."""
        if not self.topology.lag:
            return
        for section, memory in memories.items():
            if section in self._local:
                self._local[section].fill(slot, memory.tail)
            elif section > 0:
                self._tails.fill(slot, first_step, memory.tail)

    def young_memory(self, rows: int, step: int) -> Tensor:
        """What the first section of this rank looks at newly while no hand-off of a step has come. Shapes: [B, H]."""
        return self._tails.merge(rows, step, None)

    # --- inside -------------------------------------------------------------------------------------------------

    def _embed(self, ids: Tensor) -> Tensor:
        assert self.weights.embedding is not None, "a stage without embedding was given tokens"
        return F.embedding(ids, self.weights.embedding)

    def _previous(self, call: Call, section: int) -> Tensor | None:
        """What a section's rows look at newly in this step. Shapes: [B, 1, H]."""
        if section == 0 or not self.topology.staggered:
            return None
        if section in self._local:
            return self._local[section].oldest(call.rows)[:, None]
        if self.topology.lag == 0:
            return call.outputs.get(section - 1, call.carried)
        carried = None if call.carried is None else call.carried[:, 0]
        return self._tails.merge(call.rows, call.step, carried)[:, None]

    def _null_rows(self, positions: Sequence[int]) -> Tensor | None:
        """Where the null vector stands for a memory that does not exist. Shapes: bool [len(positions), 1]."""
        if not self.topology.staggered or all(position >= self.topology.lag for position in positions):
            return None
        rows = [[position < self.topology.lag] for position in positions]
        return self.device.upload(rows, torch.bool)
