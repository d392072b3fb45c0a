"""The schedule of decoding as data: what a stage does in one step, in order.

Pure functions of integers. `stagdist/decode/runtime/stage.py` executes and times the instructions. Every stage runs
the same sequence of operations (decode step, prefill, rest); step numbers count decode steps only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from stagdist.decode.topology import Topology


class Kind(StrEnum):
    """What an instruction does, and what its index means."""

    ASK = "expect token"  # announce the receive of what the last stage publishes in this step: the token, or its output
    EXPECT = "expect hand-off"  # announce the receive of what the stage before sends in this step; index: edge
    BEGIN = "begin section"  # embedding and first self-attention; index: section
    WAIT = "wait for memory"  # hand-off of `step` from the stage before has arrived; index: edge
    FINISH = "run section"  # cross-attention of the first layer and everything after it; index: section
    SEND = "send hand-off"  # give the section's output to the stage after, without waiting; index: edge
    COMBINE = "combine sections"  # weighted sum over the stages; index: stage that gets it, -1 for all
    SHARE = "share last hidden"  # the last stage's output to all stages, for a sharded head
    HEAD = "head"  # logits of this stage's slice of the vocabulary
    CHOOSE = "sample"  # candidates gathered, one token chosen
    HOST = "host work"  # rank 0 handles the text of the step before, while later stages still compute
    PUBLISH = "publish token"  # the last stage gives the token to all
    TOKEN = "wait for token"  # the other side of it


@dataclass(frozen=True)
class Instruction:
    """One instruction of a stage.

    Attributes:
        step: the step whose data it uses; in a prefill, the chunk.
        index: section, edge (edge e leads from stage e to e + 1) or stage, by kind.
    """

    kind: Kind
    step: int
    index: int = 0


def decode_step(topology: Topology, stage: int, step: int, first: int) -> tuple[Instruction, ...]:
    """Instructions of one stage in one decode step.

    Args:
        first: first step after the last rest; earlier hand-offs come from prefill.
    """
    body = _body(topology, stage, step, first)
    return (*_asking(topology, stage, step), *body, *_ending(topology, stage, step))


def prefill(topology: Topology, stage: int, num_chunks: int) -> tuple[Instruction, ...]:
    """Instructions of one stage for a prompt of `num_chunks` chunks: stage s runs chunk c while s - 1 runs c + 1.

    Ends with the first token, like a step.
    """
    instructions = list(_asking(topology, stage, num_chunks - 1))
    for chunk in range(num_chunks):
        if stage > 0:
            # Two receives are announced at most: the next chunk arrives while this one is computed.
            if chunk == 0:
                instructions.append(Instruction(Kind.EXPECT, 0, stage - 1))
            if chunk + 1 < num_chunks:
                instructions.append(Instruction(Kind.EXPECT, chunk + 1, stage - 1))
            instructions.append(Instruction(Kind.WAIT, chunk, stage - 1))
        instructions += [Instruction(Kind.FINISH, chunk, section) for section in topology.sections(stage)]
        if stage < topology.last_stage:
            instructions.append(Instruction(Kind.SEND, chunk, stage))
    return (*instructions, *_ending(topology, stage, num_chunks - 1))


def chunk_bounds(length: int, chunk_size: int) -> list[tuple[int, int]]:
    """Split a prompt into chunks. Smaller chunks at both ends were measured: they are not faster."""
    return [(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def rest(topology: Topology, stage: int, step: int, first: int) -> tuple[Instruction, ...]:
    """Instructions that receive all outstanding hand-offs before `step`, so that an idle engine has none in flight."""
    if stage == 0:
        return ()
    return tuple(
        Instruction(Kind.WAIT, late, stage - 1) for late in range(max(first, step - topology.lag), step) if topology.lag
    )


def _body(topology: Topology, stage: int, step: int, first: int) -> Iterator[Instruction]:
    """The sections of a stage. The first one waits for its memory, or, in a sequential model, for its input."""
    sections = topology.sections(stage)
    if topology.recurrent:
        sections = sections[-1:]
    elif topology.batched:
        sections = range(1)  # one pass does them all
    needed = step - topology.lag
    if stage > 0:
        yield Instruction(Kind.EXPECT, step, stage - 1)
    for section in sections:
        waits = stage > 0 and section == sections.start and needed >= first
        if waits and not topology.staggered:
            yield Instruction(Kind.WAIT, needed, stage - 1)
        yield Instruction(Kind.BEGIN, step, section)
        if waits and topology.staggered:
            yield Instruction(Kind.WAIT, needed, stage - 1)
        yield Instruction(Kind.FINISH, step, section)
    if stage < topology.last_stage:
        yield Instruction(Kind.SEND, step, stage)


def _asking(topology: Topology, stage: int, step: int) -> Iterator[Instruction]:
    """Announce the receive of the published tensor early.

    gloo posts it immediately: a message without a posted receive needs CPU time of its sender, which takes milliseconds
    while the sender computes. NCCL posts it at the wait.
    """
    combined_for_all = topology.combined and topology.head == "sharded"
    if stage < topology.last_stage and not combined_for_all:
        yield Instruction(Kind.ASK, step)


def _ending(topology: Topology, stage: int, step: int) -> Iterator[Instruction]:
    """From the last section's output to the token on all stages."""
    last = stage == topology.last_stage
    alone = topology.num_stages == 1
    sharded = topology.head == "sharded" and not alone
    if stage == 0 and not alone:
        yield Instruction(Kind.HOST, step)
    if topology.combined:
        yield Instruction(Kind.COMBINE, step, -1 if sharded else topology.last_stage)
    elif sharded:
        yield Instruction(Kind.SHARE, step)
    if last or sharded:
        yield Instruction(Kind.HEAD, step)
        yield Instruction(Kind.CHOOSE, step)
    if not alone and not sharded:
        yield Instruction(Kind.PUBLISH if last else Kind.TOKEN, step)
