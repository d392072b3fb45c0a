"""Runs this rank's sections: their rows, positions and memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.decode.control import Admission
from stagdist.decode.layers.batched import BatchedSections
from stagdist.decode.layers.cells import Angles, AnyCells, ChunkCells, DeviceCells, StepCells, step_cells
from stagdist.decode.layers.runner import LayerMath, SectionCache, SectionMath, SectionRunner
from stagdist.decode.native.layer_math import NativeMath
from stagdist.decode.runtime.hand_off import HandOffBuffers, HandOffRegister, PromptMemory
from stagdist.decode.runtime.setup import StageSetup


@dataclass(eq=False)
class PrefillState:
    """A prompt on its way through the sections of this rank.

    Attributes:
        input_ids: int64 [S] on the device.
        memories: outputs of the previous section, by section.
        dropped: its request was cancelled; chunks that entered still run, and nothing follows.
    """

    slot: int
    admission: Admission
    input_ids: Tensor
    memories: dict[int, PromptMemory]
    dropped: bool = False


@dataclass
class Call:
    """The step of several requests in one operation, or one chunk of a prompt on its way through the stages.

    Attributes:
        slots: of the rows.
        next_positions: of the tokens being chosen.
        step: number of the step.
        prompt: None for a step.
        start, ends: of a chunk: its first position, and whether it is the last one of its prompt.
        cells: cache entries that the rows write and read.
        wide: the same for the rows of all sections, if they are one batch.
        embedded: token embeddings [B, 1, H], computed at first use.
        begun: [B, 1, H], between the two halves of a section.
        carried: [B, S, H] from the previous stage.
        outputs: [B, S, H] by section.
        null_rows: bool [B, 1], where the null vector replaces missing memory.
    """

    slots: Sequence[int]
    next_positions: Sequence[int]
    step: int = 0
    prompt: PrefillState | None = None
    start: int = 0
    ends: bool = False
    cells: AnyCells | None = None
    wide: AnyCells | None = None
    embedded: Tensor | None = None
    begun: Tensor | None = None
    carried: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    null_rows: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows, B."""
        return len(self.slots)

    @property
    def length(self) -> int:
        """Positions of a chunk."""
        return self.next_positions[0] - self.start

    @property
    def is_dropped(self) -> bool:
        """Nothing follows this chunk."""
        return self.prompt is None or self.prompt.dropped

    @property
    def count(self) -> int | None:
        """Likeliest tokens to report for every position of a chunk; None if no position is scored."""
        return None if self.prompt is None else self.prompt.admission.params.prompt_logprobs

    @property
    def targets(self) -> Tensor | None:
        """Tokens of the prompt that follow the positions of a chunk, if these are scored. Shapes: int64 [S]."""
        if self.prompt is None or self.count is None:
            return None
        following = self.prompt.input_ids[self.start + 1 : self.next_positions[0] + 1]
        return following if len(following) else None


class StageSections:
    """Weights, caches and hand-offs of the sections of one rank; independent of schedules.

    Attributes:
        tokens: int64 [slots], the token that each slot feeds next; read at every step.
        received: hand-offs from the stage before, where they arrive in later steps.
        last: the last section of the stage.
    """

    def __init__(self, setup: StageSetup):
        self.setup, self.topology, self.weights, self.device = setup, setup.topology, setup.weights, setup.device
        model, topology, limits, device = setup.model, setup.topology, setup.limits, setup.device
        self.tokens = torch.zeros(limits.num_slots, dtype=torch.int64, device=device.name)
        self._angles = Angles(model, device)
        reduce = None if setup.transport is None else setup.transport.tensor_sum()
        math = LayerMath(model, setup.tensor_size, reduce, setup.lap)
        sections = setup.weights.sections
        self.caches = {each: SectionCache(model, each, limits, setup.tensor_size, device) for each in sections}
        self._batched = BatchedSections(self._step_math(math), sections, self.caches) if topology.batched else None
        self._chunk_runners = {each: SectionRunner(math, sections[each], self.caches[each]) for each in sections}
        alone = {} if topology.batched else sections
        self._runners = {each: SectionRunner(self._step_math(math), alone[each], self.caches[each]) for each in alone}
        first, *later = topology.sections(setup.index)
        self.last = (first, *later)[-1]
        sizes = topology.lag, limits.num_slots, model.hidden_size, device
        self.received = HandOffBuffers(*sizes) if setup.index > 0 and not setup.fixed else None
        registers = [first, *later] if setup.fixed and setup.index > 0 else later
        self._registers = {section: HandOffRegister(*sizes) for section in registers if topology.lag}

    # --- steps --------------------------------------------------------------------------------------------------

    def step_call(self, positions: Sequence[int], step: int) -> Call:
        """Create the call of a step of rows 0 to len(positions) - 1; rows without a request have position -1."""
        call = Call(range(len(positions)), [position + 1 for position in positions], step)
        if self.setup.native:
            placed = torch.tensor(positions)
            call.cells = DeviceCells(self._angles, placed)
            if self._batched is not None:
                call.wide = DeviceCells(self._angles, placed, repeats=self._batched.count)
        else:
            call.cells = step_cells(self._angles, positions, self.device)
            if self._batched is not None:
                call.wide = step_cells(self._angles, positions, self.device, self._batched.count)
        call.null_rows = self._null_rows(positions)
        return call

    def fixed_call(self, positions: Tensor) -> Call:
        """Create the call of a fixed-shape step, with positions as in `step_call`. Shapes: int64 [B], on the device."""
        call = Call(range(len(positions)), ())
        call.cells = self._fixed_cells(positions, 1)
        if self._batched is not None:
            call.wide = self._fixed_cells(positions, self._batched.count)
        if self.topology.staggered and self.topology.lag:
            call.null_rows = (positions < self.topology.lag)[:, None]
        if self.weights.embedding is not None:
            call.embedded = self._embed(self.tokens[: call.rows, None])
        return call

    def begin(self, call: Call, section: int) -> None:
        """Run the first self-attention of a section (of all, if they are one batch)."""
        assert call.cells is not None
        if self.topology.staggered or section == 0:
            if call.embedded is None:
                call.embedded = self._embed(self.tokens[: call.rows, None])
            hidden = call.embedded
        else:
            stream = call.outputs.get(section - 1, call.carried)
            assert stream is not None
            hidden = stream
        if self._batched is None:
            call.begun = self._runners[section].begin(hidden, call.cells)
        else:
            assert call.wide is not None
            call.begun = self._batched.begin(hidden, call.wide)

    def finish(self, call: Call, section: int) -> None:
        """Run the rest of a section; stores its output in `call.outputs`."""
        assert call.cells is not None and call.begun is not None
        if self._batched is None:
            previous = self._previous(call, section)
            call.outputs[section] = self._runners[section].finish(call.begun, call.cells, previous, call.null_rows)
        else:
            assert call.wide is not None
            memories = [hand_off.oldest(call.rows) for hand_off in self._registers.values()]
            call.outputs = self._batched.finish(call.begun, call.wide, call.cells, memories, call.null_rows)

    def push(self, call: Call) -> None:
        """Hand the outputs of a step to the sections that have registers, after all have run."""
        for section, register in self._registers.items():
            output = call.outputs.get(section if self.topology.recurrent else section - 1, call.carried)
            assert output is not None
            register.push(output[:, 0])

    # --- prompts ------------------------------------------------------------------------------------------------

    def prompt(self, slot: int, admission: Admission) -> PrefillState:
        """Create the state of a prompt."""
        input_ids = self.device.upload(admission.prompt_ids, torch.int64)
        memories = {section: PromptMemory(self.topology.lag) for section in self.weights.sections}
        return PrefillState(slot, admission, input_ids, memories)

    def run_chunk(self, call: Call, section: int) -> None:
        """Run one section over one chunk of a prompt; stores its output in `call.outputs`."""
        prompt, start, length = call.prompt, call.start, call.length
        assert prompt is not None
        memory, admission, cache = prompt.memories[section], prompt.admission, self.caches[section]
        reused = admission.reused
        if start == (reused - self.topology.lag if reused else 0):
            if admission.moved_to == admission.source:
                cache.exchange(prompt.slot, admission.source, max(admission.moved, reused))
            else:
                if admission.moved_to is not None:
                    cache.copy(prompt.slot, admission.moved_to, admission.moved)
                if reused and admission.source != prompt.slot:
                    cache.copy(admission.source, prompt.slot, reused)
        cells = ChunkCells(self._angles, prompt.slot, start, length, reused)
        before = call.outputs.get(section - 1, call.carried)
        previous = null_rows = None
        if self.topology.staggered and section > 0:
            assert before is not None
            previous = memory.shift(before)
            null_rows = self._null_rows(cells.positions)
            null_rows = None if null_rows is None else null_rows.T
        if before is None or self.topology.staggered:
            before = self._embed(prompt.input_ids[None, start : start + length])
        runner = self._chunk_runners[section]
        call.outputs[section] = runner.finish(runner.begin(before, cells), cells, previous, null_rows)

    def keep_tails(self, prompt: PrefillState, first_step: int) -> None:
        """Store the last rows of a prompt, the first hand-offs of its request."""
        if not self.topology.lag:
            return
        for section, memory in prompt.memories.items():
            if section in self._registers:
                self._registers[section].fill(prompt.slot, memory.tail)
            elif self.received is not None:
                self.received.fill(prompt.slot, first_step, memory.tail)

    def memory_of_prompt(self, step: int) -> Tensor:
        """The memory of the first section in the first step after a prefill into slot 0. Shapes: [1, 1, H]."""
        first = self.topology.sections(self.setup.index).start
        if first in self._registers:
            return self._registers[first].oldest(1)
        assert self.received is not None, "the first stage has no memory"
        return self.received.oldest(1, step)

    # --- inside -------------------------------------------------------------------------------------------------

    def _step_math(self, math: LayerMath) -> SectionMath:
        """Return the math of a section's steps, or of all sections if they are one batch: compiled, if it can be."""
        if self.setup.native:
            return NativeMath(self.setup.model, self.setup.tensor_size, math.reduce, self.device.dtype, self.setup.lap)
        if not self.setup.kernels:
            return math
        from stagdist.decode.kernels.fused_math import FusedMath  # imports triton

        setup, repeats = self.setup, self.topology.num_sections if self.topology.batched else 1
        return FusedMath(setup.model, setup.tensor_size, math.reduce, setup.limits, setup.device, repeats=repeats)

    def _fixed_cells(self, positions: Tensor, repeats: int) -> AnyCells:
        if self.setup.kernels:
            return DeviceCells(self._angles, positions, repeats=repeats)
        return StepCells(self._angles, positions, self.setup.limits.max_context, repeats=repeats)

    def _embed(self, input_ids: Tensor) -> Tensor:
        assert self.weights.embedding is not None, "this stage has no embedding"
        return F.embedding(input_ids, self.weights.embedding)

    def _previous(self, call: Call, section: int) -> Tensor | None:
        """Return the new memory of a section's rows in this step. Shapes: [B, 1, H]."""
        if section == 0 or not self.topology.staggered:
            return None
        if section in self._registers:
            return self._registers[section].oldest(call.rows)
        if self.topology.lag == 0:
            return call.outputs.get(section - 1, call.carried)
        assert self.received is not None
        return self.received.oldest(call.rows, call.step)

    def _null_rows(self, positions: Sequence[int]) -> Tensor | None:
        """Return where the null vector replaces missing memory. Shapes: bool [len(positions), 1]."""
        rows = [[0 <= position < self.topology.lag] for position in positions]
        if not self.topology.staggered or not any(row for (row,) in rows):
            return None
        return self.device.upload(rows, torch.bool)
