"""The schedule of decoding as data: what a stage does in one step, in order.

Pure functions of integers. One executor (`stagdist/decode/runtime/stage.py`) runs the instructions and times each, so a
trace is a picture of the schedule. Every stage runs the same sequence of operations (a decode step, a prefill, a rest);
numbers of steps count decode steps alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from stagdist.decode.topology import Topology


class Kind(StrEnum):
    """What an instruction does. `where` below says what its index counts."""

    ASK = "expect token"  # announce the receive of what the last stage publishes in this step: the token, or its output
    EXPECT = "expect hand-off"  # announce the receive of what the stage before sends in this step; index: edge
    BEGIN = "begin section"  # embedding and first self-attention; index: section
    WAIT = "wait for memory"  # hand-off of `step` from the stage before has arrived; index: edge
    FINISH = "run section"  # cross-attention of the first layer and everything after it; index: section
    SEND = "send hand-off"  # give the section's output to the stage after, not waited for; index: edge
    COMBINE = "combine sections"  # weighted sum over the stages; index: stage that gets it, -1 for all
    SHARE = "share last hidden"  # the last stage's output to all stages, for a sharded head
    HEAD = "head"  # logits of this stage's slice of the vocabulary
    CHOOSE = "sample"  # candidates gathered, one token chosen
    HOST = "host work"  # rank 0 handles the text of the step before, while later stages still compute
    PUBLISH = "publish token"  # the last stage gives the token to all
    TOKEN = "wait for token"  # the other side of it


@dataclass(frozen=True)
class Instruction:
    """One thing a stage does.

    Attributes:
        kind: what.
        step: the step whose data it is about; of a prefill, the chunk.
        index: section, edge (edge e leads from stage e to e + 1) or stage, by kind.
    """

    kind: Kind
    step: int
    index: int = 0


def decode_step(topology: Topology, stage: int, step: int, first: int) -> tuple[Instruction, ...]:
    """Instructions of one stage in one decode step.

    Args:
        step: number of the step; its token is known to all stages.
        first: first step since all hand-offs were at rest; older ones were filled by prefill.
    """
    parts = _staggered_body if topology.staggered else _sequential_body
    return (*_asking(topology, stage, step), *parts(topology, stage, step, first), *_ending(topology, stage, step))


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
    """Where a prompt is cut for prefill.

    Smaller pieces at its ends, where the pipeline fills and drains, were measured: their slower products cost what they
    save.
    """
    return [(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def rest(topology: Topology, stage: int, step: int, first: int) -> tuple[Instruction, ...]:
    """What brings the hand-offs to rest before `step`: everything sent and not yet needed is received.

    Run when no request is left, so that an idle engine has nothing in flight.
    """
    if stage == 0:
        return ()
    return tuple(
        Instruction(Kind.WAIT, late, stage - 1) for late in range(max(first, step - topology.lag), step) if topology.lag
    )


def _staggered_body(topology: Topology, stage: int, step: int, first: int) -> Iterator[Instruction]:
    sections = topology.sections(stage)
    if topology.recurrent:
        sections = range(sections[-1], sections[-1] + 1)
    elif topology.batched:
        sections = range(1)  # one pass does them all
    if stage > 0:
        yield Instruction(Kind.EXPECT, step, stage - 1)
    for section in sections:
        yield Instruction(Kind.BEGIN, step, section)
        needed = step - topology.lag
        if section == sections.start and stage > 0 and needed >= first:
            yield Instruction(Kind.WAIT, needed, stage - 1)
        yield Instruction(Kind.FINISH, step, section)
    if stage < topology.last_stage:
        yield Instruction(Kind.SEND, step, stage)


def _sequential_body(topology: Topology, stage: int, step: int, first: int) -> Iterator[Instruction]:
    if stage > 0:
        yield Instruction(Kind.EXPECT, step, stage - 1)
        yield Instruction(Kind.WAIT, step, stage - 1)
    for section in topology.sections(stage):
        yield Instruction(Kind.BEGIN, step, section)
        yield Instruction(Kind.FINISH, step, section)
    if stage < topology.last_stage:
        yield Instruction(Kind.SEND, step, stage)


def _asking(topology: Topology, stage: int, step: int) -> Iterator[Instruction]:
    """A receive is announced long before it is waited for.

    On gloo it is posted at once: a message without a posted receive waits until a thread of its sender gets the
    processor, which takes milliseconds while the sender computes. On NCCL it is posted where it is waited for.
    """
    combined_for_all = topology.combined and topology.head == "sharded"
    if stage < topology.last_stage and not combined_for_all:
        yield Instruction(Kind.ASK, step)


def _ending(topology: Topology, stage: int, step: int) -> Iterator[Instruction]:
    """From the last section's output to the token, known to all."""
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
