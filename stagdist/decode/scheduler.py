"""What runs next: waiting requests, slots, and the decision about each operation. Host logic of rank 0 alone."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from stagdist.decode.engine_stats import SlotState, StageReport
from stagdist.decode.operations import Control, Operation
from stagdist.decode.request import FinishReason, Request, allowed_new_tokens
from stagdist.decode.topology import Limits


@dataclass(eq=False)
class ScheduledRequest:
    """A request that waits for a slot or has one.

    Attributes:
        allowed: tokens that it may generate; set at its admission.
        scheduled: tokens of all operations decided so far, including the current one.
        admitted_s: when it got a slot, in seconds of `time.perf_counter`.
        cached_tokens: tokens of its prompt that are reused.
        finish: set when it has ended; its slot is freed by the next decision.
    """

    request: Request
    allowed: int = 0
    scheduled: int = 0
    admitted_s: float | None = None
    cached_tokens: int = 0
    finish: FinishReason | None = None


Entry = TypeVar("Entry", bound=ScheduledRequest)


class Scheduler(Generic[Entry]):
    """Assigns slots to requests in the order in which they came, and decides every operation.

    Attributes:
        waiting: requests without a slot.
        running: requests by slot.
        prefix_queries, prefix_hits, step_s, stages: see `EngineStats`.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self.waiting: deque[Entry] = deque()
        self.running: dict[int, Entry] = {}
        self.prefix_queries = self.prefix_hits = 0
        self.step_s, self.stages = 0.0, tuple[StageReport, ...]()
        self._planned: deque[dict[int, Entry]] = deque()  # rows of operations that were decided but have not run

    def entries(self) -> tuple[Entry, ...]:
        """All requests, the running ones first."""
        return (*self.running.values(), *self.waiting)

    def slots(self) -> tuple[SlotState, ...]:
        """What is in each slot."""
        return tuple(self._slot(self.running.get(slot)) for slot in range(self._limits.num_slots))

    @staticmethod
    def _slot(entry: Entry | None) -> SlotState:
        if entry is None:
            return SlotState(None, "free")
        request = entry.request
        position = len(request.prompt_ids) + entry.scheduled - 1
        return SlotState(request.request_id, "decode", position, entry.cached_tokens)

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
            del self.running[slot]
        if stopping:
            return Control(Operation.STOP, retired=retired)
        free = [slot for slot in range(self._limits.num_slots) if slot not in self.running]
        if self.waiting and free:
            slot, admitted = free[0], self.waiting.popleft()
            admitted.allowed, admitted.scheduled = allowed_new_tokens(admitted.request, self._limits.max_context), 1
            admitted.admitted_s = time.perf_counter()
            self.running[slot] = admitted
            self._planned.append({slot: admitted})
            return Control(Operation.ADMIT, slot, retired)
        if self.running:
            for running in self.running.values():
                running.scheduled += 1
            self._planned.append(dict(self.running))
            return Control(Operation.STEP, retired=retired)
        return Control(Operation.STOP if closed else Operation.REST, retired=retired)

    def admission(self, slot: int) -> Request:
        """Return the request of the ADMIT that is about to run."""
        return self._planned[0][slot].request

    def taken(self) -> dict[int, Entry]:
        """Return the requests by slot whose tokens the oldest decided operation has chosen, and forget it."""
        return self._planned.popleft()
