"""What runs next: waiting requests, slots, and the decision about each operation. Host logic of rank 0 alone.

Every operation is a step of all requests that decode and at most one chunk of one prompt. Prompts take turns. A free
slot keeps its caches: a prompt that begins like what a slot holds starts behind the common part, there or in a copy.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from stagdist.config.parts import ModelConfig
from stagdist.decode.chunk_sizer import ChunkSizer
from stagdist.decode.control import Admission, Chunk, Control, Operation
from stagdist.decode.engine_stats import SlotState, StageReport
from stagdist.decode.request import FinishReason, Request, allowed_new_tokens
from stagdist.decode.topology import Limits, Topology

REPORT_S = 5.0
"""Ranks report at least this often."""


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
    """

    request: Request
    allowed: int = 0
    scheduled: int = 0
    tokens: list[int] = field(default_factory=list)
    admitted_s: float | None = None
    entered: int = 0
    cached_tokens: int = 0
    finish: FinishReason | None = None

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


@dataclass(frozen=True)
class _Held:
    """What the caches of a slot hold.

    Attributes:
        tokens: the known ones, from position 0.
        positions: all that were written.
        freed: number of the operation before which the slot became free; 0 for an empty one.
        moves: positions that may be written before the last stage copies them.
    """

    tokens: Sequence[int] = ()
    positions: int = 0
    freed: int = 0
    moves: int = 0


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
        self._free = {slot: _Held() for slot in range(limits.num_slots)}
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
            return SlotState(None, "free", 0, len(self._free[slot].tokens))
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
        for entry in self.waiting if self._free and not (admitted and self._turns) else ():
            found = self._longest_prefix(entry.request)
            if found is not None:
                self._admitted = True
                self.waiting.remove(entry)
                slot, admission = self._admit(entry, *found)
                return self._chunk_of(slot), admission
        return (self._chunk_of(self._turns.popleft()), None) if self._turns else (None, None)

    def _chunk_of(self, slot: int) -> Chunk:
        entry = self.running[slot]
        start, length = entry.entered, len(entry.request.prompt_ids)
        decoding = any(each.decodes for each in self.running.values())
        entry.entered = min(start + (self._sizer.chunk if decoding else self._limits.chunk_size), length)
        if entry.entered < length:
            self._turns.append(slot)
        return Chunk(slot, start, entry.entered, entry.entered == length)

    # --- slots --------------------------------------------------------------------------------------------------

    def _release(self, slot: int) -> None:
        entry = self.running.pop(slot)
        self._free[slot] = replace(self._held_by(entry), moves=0)
        if slot in self._turns:
            self._turns.remove(slot)

    def _held_by(self, entry: Entry) -> _Held:
        prompt, moves = entry.request.prompt_ids, self._topology.num_stages if entry.decodes else 0
        # Positions decoded recurrently are not what a prompt would leave.
        tokens = prompt if self._topology.recurrent else (*prompt, *entry.tokens)
        return _Held(tokens[: entry.positions], entry.positions, self._number, moves)

    def _longest_prefix(self, request: Request) -> tuple[int | None, int] | None:
        """The slot that spares most of a prompt, and the positions in common; None: it pays to wait for one."""
        best, spared, common = None, 0, 0
        if not self._limits.prefix_caching or request.params.prompt_logprobs is not None:
            return best, common
        prompt = request.prompt_ids
        for slot in range(self._limits.num_slots):
            entry = self.running.get(slot)
            held = self._free[slot] if entry is None else self._held_by(entry)
            shared = _common_length(prompt, held.tokens)
            start = self._start_after(shared, held, len(prompt))
            if start > spared or (start == spared and start and best in self.running):
                best, spared, common = slot, start, shared
        for entry in (self.running[slot] for slot in self._turns):
            other = entry.request.prompt_ids
            held = _Held(other, len(other), moves=self._topology.num_stages)
            later = self._start_after(_common_length(prompt, other), held, len(prompt))
            if later - spared >= self._limits.chunk_size:
                return None
        return best, common

    def _start_after(self, common: int, held: _Held, length: int) -> int:
        """The first position to compute of a prompt that shares `common` positions with a slot; 0: all of them.

        The last `lag` outputs of every section are computed again: they are the memory of the positions that follow.
        """
        lag = self._topology.lag
        start = common - lag if lag else min(common, length - 1)
        written = held.positions + held.moves
        if self._window is not None and written > max(self._window, start + 1):
            return 0  # the ring buffer has lost what the first position sees
        return max(0, start)

    def _slot_for(self, source: int | None, common: int) -> int:
        """The slot of the source if little of it is lost, else an empty one, else the one that is free the longest."""
        longest_free = min(self._free, key=lambda slot: (self._free[slot].freed, slot))
        if source not in self._free:
            return longest_free
        assert source is not None
        kept = 0 if self._free[longest_free].positions == 0 else common
        return source if len(self._free[source].tokens) - common <= kept else longest_free

    def _admit(self, entry: Entry, source: int | None, common: int) -> tuple[int, Admission]:
        request, lag = entry.request, self._topology.lag
        if self._limits.prefix_caching and request.params.prompt_logprobs is None:
            self.prefix_queries += len(request.prompt_ids)
        slot = self._slot_for(source, common)
        del self._free[slot]
        entry.admitted_s = time.perf_counter()
        entry.allowed = allowed_new_tokens(request, self._limits.max_context)
        if source is not None:
            common = min(common, len(request.prompt_ids) - (lag == 0))
            entry.entered = entry.cached_tokens = common - lag
            self.prefix_hits += entry.cached_tokens
        self.running[slot] = entry
        return slot, Admission(request.prompt_ids, request.params, slot if source is None else source, common)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix. Slices are compared, which is faster than tokens."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
