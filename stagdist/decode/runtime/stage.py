"""One rank's part of the model: its operations, and the requests and prompts in its slots."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stagdist.decode.control import Admission, Chunk
from stagdist.decode.engine_stats import StageReport
from stagdist.decode.layers.runner import SectionCache
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.executor import CATEGORIES, Executor, HostWork
from stagdist.decode.runtime.graphs import CaptureProgress, StepGraphs
from stagdist.decode.runtime.hosted_sections import Call, PrefillState, StageSections
from stagdist.decode.runtime.outcome import HostBuffers, HostCopy, Outcome
from stagdist.decode.runtime.readout import Readout
from stagdist.decode.runtime.schedule import Instruction, Kind, Work
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.sampling.sampler import Choice
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.parallel.device import on_cuda
from stagdist.telemetry.pulse import Phase, Pulse
from stagdist.telemetry.spans import SpanRecorder


class Stage:
    """One rank's part of the model.

    Args:
        recorder: records a span for every instruction.
        pulse: heartbeat for a supervisor.

    Attributes:
        executor: runs the instructions.
    """

    def __init__(
        self,
        setup: StageSetup,
        *,
        recorder: SpanRecorder | None = None,
        pulse: Pulse | None = None,
    ):
        self.setup, self.readout, self._sections = setup, Readout(setup), StageSections(setup)
        self.model, self.topology, self.limits = setup.model, setup.topology, setup.limits
        self.weights, self.device, self.index = setup.weights, setup.device, setup.index
        self._transport = setup.transport
        self._next_positions: dict[int, int] = {}  # of the active slots
        self.pulse = pulse or Pulse()
        self._first_step = self._number = 0
        self._prompts: dict[int, PrefillState] = {}  # by slot, until their tokens are decoded
        self.executor = Executor(setup, self._sections, self.readout, recorder, self.pulse)
        self._chunks = self.executor.chunks
        self._graphs = StepGraphs(self.executor) if setup.fixed else None
        self._host = HostBuffers(setup.limits.num_slots, setup.device, setup.transport)
        self._moved = True  # positions on the device are not those of `_next_positions`

    # --- operations, the same on every rank ---------------------------------------------------------------------

    def capture(self, progress: CaptureProgress | None = None) -> None:
        """Capture the CUDA graphs of all steps, before the first prefill; does nothing where there are none.

        Args:
            progress: called after each graph.
        """
        if self._graphs is not None:
            self._graphs.capture(progress)

    def run(
        self,
        chunk: Chunk | None = None,
        admission: Admission | None = None,
        *,
        step: bool,
        host_work: HostWork | None = None,
    ) -> Outcome:
        """Run one operation together with all ranks.

        Args:
            chunk: of a prompt, enters the first stage.
            admission: of that prompt, with its first chunk.
            step: decode one token for every slot whose prompt has left the last stage; there must be one.
            host_work: called on rank 0 while later stages compute.
        """
        if self._transport is not None:
            self._transport.step = self.step_number
        self._chunks.appendleft(None if chunk is None else self._enter(chunk, admission))
        outcome = Outcome(self._run(step, host_work))
        leaving = self._chunks[-1]
        if leaving is not None and not leaving.is_dropped:
            outcome = self._end(leaving, outcome)
        if self._graphs is not None and self._transport is not None:
            self._transport.finish_sends()  # before the next graph sends on the same communicators
        self._number += 1
        return outcome

    def prefill(self, slot: int, input_ids: Sequence[int], params: SamplingParams) -> Choice:
        """Run a prompt alone, in operations without a step, and choose its first token on all ranks.

        Shapes: the choice has one row.
        """
        length, size = len(input_ids), self.limits.chunk_size
        for start in range(0, length, size):
            chunk = Chunk(slot, start, min(start + size, length), start + size >= length)
            outcome = self.run(chunk, None if start else Admission(tuple(input_ids), params), step=False)
        for _ in range(self.topology.last_stage):
            outcome = self.run(step=False)
        assert outcome.first is not None
        return outcome.first

    def rest(self) -> None:
        """Complete all hand-offs, so that nothing is in flight. Chunks on their way are dropped."""
        self._chunks.appendleft(None)
        for instruction in schedule.rest(self.topology, self.index, self._work(step=True)):
            self.setup.link.hand_offs_in.take((instruction.part, instruction.number))
        self._chunks.extend([None] * self.topology.num_stages)
        if self._transport is not None:
            self._transport.finish_sends()
            self._transport.wait_for_device("while hand-offs were completed")
        self._first_step = self.step_number

    def reports(self) -> tuple[StageReport, ...]:
        """Exchange what the ranks have spent their time on since they started; the same on every rank.

        Raises:
            TransportError: a rank has ended or does not answer.
        """
        spent = self.executor.spent_s
        compute = sum(spent[category] for category in ("compute", "head", "sampling"))
        for_token = sum(spent[category] for category in ("wait for token", "wait for last section", "combine"))
        own = torch.tensor([self.index, compute, spent["wait for memory"], for_token, spent["send"]]).double()
        rows = own[None] if self._transport is None else self._transport.exchange(own)
        return tuple(StageReport(rank, int(stage), *times) for rank, (stage, *times) in enumerate(rows.tolist()))

    def retire(self, slots: Sequence[int]) -> None:
        """Free slots. The caches stay; chunks of a prompt that are on their way still run."""
        for slot in slots:
            self._next_positions.pop(slot, None)
            self._moved = True
            if slot in self._prompts:
                self._prompts.pop(slot).dropped = True
            self.readout.sampler.retire(slot)

    @property
    def runs_ahead(self) -> bool:
        """The host can launch an operation before it has read the tokens of the previous one: a device queues them."""
        return on_cuda(self.device.name) or (self._transport is not None and not self._transport.rules.wait_blocks)

    def to_host(self, outcome: Outcome) -> HostCopy:
        """Begin to copy an outcome to the host; later operations may overwrite it on the device.

        The copies of at most `outcome.IN_FLIGHT` outcomes may be used at a time.
        """
        return self._host.copy(outcome, self.step_number - (outcome.step is not None))

    def on_host(self, copy: HostCopy) -> Outcome:
        """The outcome in host memory. Here rank 0 waits for the device.

        Raises:
            TransportError: a peer has ended or does not answer.
        """
        self.pulse.beat(Phase.RECEIVE)
        return copy.wait()

    def close(self) -> None:
        """Release the CUDA graphs; the stage cannot run afterwards."""
        if self._graphs is not None:
            self._graphs.close()

    @property
    def step_number(self) -> int:
        """Number of the next step."""
        return self.executor.step_number

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
        return self._sections.memory_of_prompt(self.step_number)

    # --- execution ----------------------------------------------------------------------------------------------

    def _enter(self, chunk: Chunk, admission: Admission | None) -> Call:
        if admission is not None:
            self._prompts[chunk.slot] = self._sections.prompt(chunk.slot, admission)
        prompt = self._prompts[chunk.slot]
        return Call([chunk.slot], [chunk.stop], prompt=prompt, start=chunk.start, ends=chunk.ends)

    def _run(self, step: bool, host_work: HostWork | None) -> Choice | None:
        """Run an operation up to the step's tokens."""
        call = choice = None
        if step and self._graphs is not None:
            choice = self._run_graph(self._graphs)
        elif step:
            call = self._sections.step_call(self._positions(), self.step_number)
        self.executor.run(schedule.operation, self._work(call is not None), call, host_work)
        if call is not None:
            self._sections.push(call)
            choice = self.readout.choice
            self._sections.tokens[: len(choice.tokens)] = choice.tokens
        if own := self._chunks[self.index]:
            own.carried = None
            used_later = self.topology.combined and (own.ends or own.targets is not None)
            if self.index < self.topology.last_stage and not used_later:
                own.outputs = {}
        if choice is not None:
            self._next_positions = {slot: position + 1 for slot, position in self._next_positions.items()}
            self.executor.step_number += 1
        return choice

    def _end(self, leaving: Call, outcome: Outcome) -> Outcome:
        """Score a chunk that left the last stage; after a prompt's last one, its slot decodes from the next step on."""
        prompt, scored = leaving.prompt, leaving.targets is not None
        assert prompt is not None
        slot, admission = prompt.slot, prompt.admission
        if leaving.ends:
            self.readout.sampler.admit(slot, admission.params, admission.prompt_ids)
        work = replace(self._work(step=False), ends=leaving.ends, scored=scored)
        self.executor.run(schedule.ending, work)
        if scored:
            outcome = replace(outcome, scores=self.readout.scores)
        if not leaving.ends:
            return outcome
        del self._prompts[slot]
        self._sections.keep_tails(prompt, self.step_number)
        self._sections.tokens[slot] = self.readout.choice.tokens[0]
        self._next_positions[slot] = len(admission.prompt_ids)
        self._moved = True
        return replace(outcome, first=self.readout.choice)

    def _positions(self) -> list[int]:
        """Return the position of the next token of each row, up to the last active slot; -1 for unused rows."""
        return [self._next_positions.get(slot, -1) for slot in range(1 + max(self._next_positions))]

    def _work(self, step: bool) -> Work:
        """Describe the present operation."""
        entered = tuple(call is not None for call in self._chunks)
        number = self.step_number if step else None
        return Work(self._number, number, self._first_step, entered, fixed=self._graphs is not None)

    def _run_graph(self, graphs: StepGraphs) -> Choice:
        """Run a step as one graph; log-probabilities and margins are computed after it."""
        positions = self._positions()
        if self._moved:
            graphs.place([self._next_positions.get(slot, -1) for slot in range(self.limits.num_slots)])
            self._moved = False
        self.pulse.beat(Phase.FORWARD)
        call = Call(range(len(positions)), [position + 1 for position in positions])
        mode = self.readout.sampler.mode(call.slots)
        began_s = time.perf_counter()
        with self.executor.span(Instruction(Kind.FINISH, 0)):
            graphs.run(call.rows, mode)
        self.executor.spent_s[CATEGORIES[Kind.FINISH]] += time.perf_counter() - began_s
        if mode is not Mode.OTHER:
            return Choice(self._sections.tokens[: call.rows])
        self.executor.run(schedule.choosing, self._work(step=True), call)
        self._sections.tokens[: call.rows] = self.readout.choice.tokens
        return self.readout.choice
