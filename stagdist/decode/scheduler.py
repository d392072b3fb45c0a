"""What runs next: waiting requests, slots, and the decision about each operation. Host logic of rank 0 alone.

Every operation is a step of all requests that decode and at most one chunk of one prompt. Prompts take turns. A free
slot keeps its caches: a prompt that begins like what a slot holds starts behind the common part, there or in a copy.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from stagdist.config.parts import ModelConfig
from stagdist.decode.chunk_sizer import ChunkSizer, tapering_chunk
from stagdist.decode.control import Admission, Chunk, Control, Operation
from stagdist.decode.engine_stats import SlotState, StageReport
from stagdist.decode.request import FinishReason, Request, allowed_new_tokens
from stagdist.decode.topology import Limits, Topology

REPORT_S = 5.0
"""Ranks report at least this often."""

LOOKUPS = 4
"""Waiting requests whose prefix is looked for in one decision: it must take less time than a step."""

Tokens = npt.NDArray[np.int64]


@dataclass(eq=False)
class ScheduledRequest:
    """A request that waits for a slot or has one.

    Attributes:
        allowed: tokens that it may generate; set at its admission.
        scheduled: tokens of all operations decided so far, including the current one.
        tokens: those it has generated.
        admitted_s: when it got a slot, in seconds of `time.perf_counter`.
        entered: positions of its prompt that are in the caches, or on their way there.
        cached_tokens: positions of its prompt that were not computed again.
        finish: set when it has ended; its slot is freed by the next decision.
        awaited: the request that computes the beginning of its prompt, while it waits for that.
        prompt: its prompt, which is compared faster than a tuple.
    """

    request: Request
    allowed: int = 0
    scheduled: int = 0
    tokens: list[int] = field(default_factory=list)
    admitted_s: float | None = None
    entered: int = 0
    cached_tokens: int = 0
    finish: FinishReason | None = None
    awaited: "ScheduledRequest | None" = None
    prompt: Tokens = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.prompt = np.array(self.request.prompt_ids, np.int64)

    @property
    def is_ready(self) -> bool:
        """It does not wait for another prompt."""
        awaited = self.awaited
        return awaited is None or awaited.finish is not None or awaited.entered == len(awaited.prompt)

    @property
    def decodes(self) -> bool:
        """Its first token is chosen, or is being chosen in the operation decided last."""
        return self.scheduled > 0

    @property
    def positions(self) -> int:
        """Positions that its slot holds after the operations decided so far."""
        return self.entered + max(0, self.scheduled - 1)


Entry = TypeVar("Entry", bound=ScheduledRequest)


@dataclass(frozen=True)
class OperationPlan(Generic[Entry]):
    """The requests that get tokens in one operation.

    Attributes:
        rows: requests of the step by slot, which is their row.
        first: the request whose prompt ends.
        scored: the request whose chunk leaves the last stage and is scored, if it asks for that.
        chunk: positions of the longest chunk on any stage.
    """

    rows: dict[int, Entry]
    first: Entry | None = None
    scored: Entry | None = None
    chunk: int = 0


class Scheduler(Generic[Entry]):
    """Assigns slots to requests in the order in which they came, and decides every operation.

    Attributes:
        waiting: requests without a slot.
        running: requests by slot.
        prefix_queries, prefix_hits, step_s, stages: see `EngineStats`.
    """

    def __init__(self, model: ModelConfig, topology: Topology, limits: Limits):
        self._topology, self._limits = topology, limits
        window = model.cross_attention_window
        self._window = window if window is not None and window < limits.max_context else None
        self.waiting: deque[Entry] = deque()
        self.running: dict[int, Entry] = {}
        self.prefix_queries = self.prefix_hits = 0
        self.stages = tuple[StageReport, ...]()
        self._sizer = ChunkSizer(limits)
        self._reported_s = time.perf_counter()
        self._turns: deque[int] = deque()  # slots whose prompts have more chunks
        self._admitted = False  # the operation decided last has the first chunk of a prompt
        # Free slots, and the number of the operation before which each became free; 0 for an empty one.
        self._free = dict.fromkeys(range(limits.num_slots), 0)
        self._holders: dict[int, Entry] = {}  # requests whose positions are in the caches, ended ones too, by slot
        self._number = 0  # of the operation
        # Chunks on their way through the stages with their requests, the newest first.
        self._chunks: deque[tuple[Chunk, Entry] | None] = deque([None] * topology.num_stages, topology.num_stages)
        self._planned: deque[OperationPlan[Entry]] = deque()  # of operations that were decided but have not run

    def entries(self) -> tuple[Entry, ...]:
        """All requests, the running ones first."""
        return (*self.running.values(), *self.waiting)

    def slots(self) -> tuple[SlotState, ...]:
        """What is in each slot."""
        return tuple(self._slot(slot) for slot in range(self._limits.num_slots))

    def _slot(self, slot: int) -> SlotState:
        if slot in self._free:
            return SlotState(None, "free", 0, self._known(slot))
        entry = self.running[slot]
        request_id, cached = entry.request.request_id, entry.cached_tokens
        return SlotState(request_id, "decode" if entry.decodes else "prefill", entry.positions, cached)

    @property
    def step_s(self) -> float:
        """See `EngineStats`."""
        return self._sizer.step_s

    def drop_ended(self) -> None:
        """Forget waiting requests that have ended."""
        self.waiting = deque(each for each in self.waiting if each.finish is None)

    def decide(self, *, stopping: bool, closed: bool) -> Control:
        """Decide the operation after the one that is about to run.

        Args:
            stopping: end now.
            closed: end after the last request.
        """
        retired = tuple(slot for slot, each in self.running.items() if each.finish or each.scheduled >= each.allowed)
        for slot in retired:
            self._release(slot)
        if stopping:
            return Control(Operation.STOP, retired=retired)
        if time.perf_counter() - self._reported_s > REPORT_S:
            self._reported_s = time.perf_counter()
            self._sizer.pause()
            return Control(Operation.REPORT, retired=retired)
        rows = {slot: each for slot, each in self.running.items() if each.decodes}
        chunk, admission = self._next_chunk()
        self._chunks.appendleft(None if chunk is None else (chunk, self.running[chunk.slot]))
        if not rows and not any(self._chunks):
            self._sizer.pause()
            return Control(Operation.STOP if closed and not self.waiting else Operation.REST, retired=retired)
        for each in rows.values():
            each.scheduled += 1
        self._planned.append(self._plan(rows))
        self._number += 1
        return Control(Operation.RUN, bool(rows), retired, chunk, admission)

    def taken(self) -> OperationPlan[Entry]:
        """Return the plan of the operation that has just run, and forget it."""
        plan = self._planned.popleft()
        self._sizer.took(steps=bool(plan.rows), chunk=plan.chunk)
        return plan

    # --- chunks -------------------------------------------------------------------------------------------------

    def _plan(self, rows: dict[int, Entry]) -> OperationPlan[Entry]:
        """The plan of an operation, with the request whose chunk leaves the last stage in it."""
        longest = max((chunk.stop - chunk.start for chunk, _ in filter(None, self._chunks)), default=0)
        if self._chunks[-1] is None:
            return OperationPlan(rows, chunk=longest)
        chunk, entry = self._chunks[-1]
        if self.running.get(chunk.slot) is not entry:  # cancelled
            return OperationPlan(rows, chunk=longest)
        entry.scheduled += chunk.ends
        return OperationPlan(rows, entry if chunk.ends else None, entry, longest)

    def _next_chunk(self) -> tuple[Chunk | None, Admission | None]:
        """The first chunk of a new prompt or the next one of a prompt in a slot; after the former comes the latter."""
        admitted, self._admitted = self._admitted, False
        ready = (entry for entry in self.waiting if entry.is_ready)
        for entry in islice(ready, LOOKUPS) if self._free and not (admitted and self._turns) else ():
            found = self._longest_prefix(entry)
            if found is not None:
                self._admitted = True
                self.waiting.remove(entry)
                slot, admission = self._admit(entry, *found)
                return self._chunk_of(slot), admission
        return (self._chunk_of(self._turns.popleft()), None) if self._turns else (None, None)

    def _chunk_of(self, slot: int) -> Chunk:
        entry = self.running[slot]
        start, length = entry.entered, len(entry.request.prompt_ids)
        entry.entered = min(start + self._chunk_size(length - start), length)
        if entry.entered < length:
            self._turns.append(slot)
        return Chunk(slot, start, entry.entered, entry.entered == length)

    def _chunk_size(self, remaining: int) -> int:
        """Positions of the next chunk of a prompt, at most."""
        if any(each.decodes for each in self.running.values()):
            return self._sizer.chunk
        most = self._limits.chunk_size
        followed = self._turns or self.waiting  # another prompt fills the first stages
        return most if followed or self._topology.num_stages == 1 else tapering_chunk(remaining, most)

    # --- slots --------------------------------------------------------------------------------------------------

    def _release(self, slot: int) -> None:
        del self.running[slot]
        self._free[slot] = self._number
        if slot in self._turns:
            self._turns.remove(slot)

    def _known(self, slot: int) -> int:
        """Positions of a slot that a prompt can reuse; those decoded recurrently are not what a prompt would leave."""
        holder = self._holders.get(slot)
        if holder is None:
            return 0
        return min(holder.positions, len(holder.prompt) + (0 if self._topology.recurrent else len(holder.tokens)))

    def _reuses(self, request: Request) -> bool:
        return self._limits.prefix_caching and request.params.prompt_logprobs is None

    def _longest_prefix(self, entry: Entry) -> tuple[int | None, int, int] | None:
        """The slot that saves most of a prompt, the positions in common, and the first one to compute.

        None: it pays to wait until another prompt is computed.
        """
        source, common, saved = None, 0, 0
        awaited, later = None, 0
        length, stages = len(entry.prompt), self._topology.num_stages
        for slot, holder in self._holders.items() if self._reuses(entry.request) else ():
            alike = _common_length(entry.prompt, holder)
            shared = min(alike, self._known(slot))
            # The last stage copies them late: a request that decodes may write more until then.
            written = holder.positions + (stages if slot in self.running and holder.decodes else 0)
            start = self._start_after(shared, written, length)
            if start > saved or (start == saved and start and source in self.running):
                source, common, saved = slot, shared, start
            if slot in self._turns:
                size = len(holder.prompt)
                start = self._start_after(alike, size + stages, length)
                awaited, later = (holder, start) if start > later else (awaited, later)
        if later - saved >= self._limits.chunk_size:
            entry.awaited = awaited
            return None
        return source, common, saved

    def _start_after(self, common: int, written: int, length: int) -> int:
        """The first position to compute of a prompt that shares `common` positions with a slot; 0: all of them.

        The last `lag` outputs of every section are computed again: they are the memory of the positions that follow.
        """
        lag = self._topology.lag
        start = common - lag if lag else min(common, length - 1)
        if self._window is not None and written > max(self._window, start + 1):
            return 0  # the ring buffer has lost what the first position sees
        return max(0, start)

    def _make_room(self, slot: int, source: int | None, common: int) -> int | None:
        """Move what a free slot holds: to the source, if the prompt continues all that this holds, else to the slot
        that is free the longest. None: it is that one, or nothing is lost.
        """
        lost = self._known(slot) - (common if source == slot else 0)
        others = [each for each in self._free if each != source]
        target = min(others, key=lambda each: (self._free[each], each), default=slot)
        if source in self._free and source != slot and self._known(source) == common:
            target = source
        if lost <= 0 or target == slot:
            return None
        self._holders[target], self._free[target] = self._holders[slot], self._free[slot]
        return target

    def _admit(self, entry: Entry, source: int | None, common: int, start: int) -> tuple[int, Admission]:
        request = entry.request
        if self._reuses(request):
            self.prefix_queries += len(entry.prompt)
        slot = min(self._free)  # a step computes all rows up to the highest slot that decodes
        moved = self._make_room(slot, source, common) if self._limits.prefix_caching else None
        kept = 0 if moved is None else self._holders[moved].positions
        del self._free[slot]
        entry.admitted_s, entry.awaited = time.perf_counter(), None
        entry.allowed = allowed_new_tokens(request, self._limits.max_context)
        entry.entered = entry.cached_tokens = start
        self.prefix_hits += start
        self.running[slot] = self._holders[slot] = entry
        reused = 0 if source is None else start + self._topology.lag
        source = slot if source is None else source
        return slot, Admission(request.prompt_ids, request.params, source, reused, moved, kept)


def _common_length(prompt: Tokens, holder: ScheduledRequest) -> int:
    """Positions at which a prompt and a request with its answer agree, from the first one on."""
    common = _agreement(prompt, holder.prompt)
    if common == len(holder.prompt):
        common += _agreement(prompt[common:], np.array(holder.tokens[: len(prompt) - common], np.int64))
    return common


def _agreement(one: Tokens, other: Tokens) -> int:
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size
