"""What an engine is doing, as a snapshot for other threads: counters, slots and the ranks' times."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SlotState:
    """One slot.

    Attributes:
        request_id: None if it is free.
        phase: of its request.
        position: positions of its request that are computed.
        cached: positions that were reused, or that a free slot keeps for reuse.
    """

    request_id: str | None
    phase: Literal["free", "prefill", "decode"]
    position: int = 0
    cached: int = 0


@dataclass(frozen=True)
class StageReport:
    """How one rank spent its time since the engine started, in seconds."""

    rank: int
    stage: int
    compute_s: float
    wait_memory_s: float
    wait_token_s: float
    send_s: float


@dataclass(frozen=True)
class EngineStats:
    """A snapshot, replaced once per operation.

    Attributes:
        running: requests with a slot.
        waiting: requests without one.
        waiting_tokens: tokens of their prompts.
        steps: decode steps so far.
        operations: steps, chunks of prompts and rests so far.
        positions_used: positions of all slots that hold something.
        prompt_tokens_total: tokens of all prompts that were prefilled, reused ones included.
        generation_tokens_total: tokens of all outputs.
        prefix_queries_total: tokens of prompts for which a prefix to reuse was looked for.
        prefix_hits_total: tokens that were reused.
        step_s: moving mean of steps without a chunk.
        stages: of all ranks, or empty before they reported.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    steps: int = 0
    operations: int = 0
    slots: tuple[SlotState, ...] = ()
    positions_used: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    step_s: float = 0.0
    stages: tuple[StageReport, ...] = ()
