"""The schedule of decoding as data: what a stage does in one operation, in order.

Pure functions of integers. `stagdist/decode/runtime/stage.py` executes and times the instructions. Every stage runs the
same sequence of operations. An operation is a step of all requests that decode, if there are any, and beside it at most
one chunk of one prompt on every stage: the chunk that entered the first stage in operation k runs on stage s in
operation k + s. So the hand-off of a chunk is one operation old when it is needed, and the first token of a prompt is
chosen `num_stages - 1` operations after its last chunk entered.
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


class WorkPart(StrEnum):
    """The part of an operation that an instruction belongs to."""

    STEP = "step"
    CHUNK = "chunk"
    SCORES = "scores"  # of the positions of the chunk that left the last stage


@dataclass(frozen=True)
class Instruction:
    """One instruction of a stage.

    Attributes:
        number: of a step, the step whose data it uses; of a chunk, the operation in which that chunk entered.
        index: section, edge (edge e leads from stage e to e + 1) or stage, by kind.
    """

    kind: Kind
    number: int
    index: int = 0
    part: WorkPart = WorkPart.STEP


@dataclass(frozen=True)
class Work:
    """What all stages do in one operation.

    Attributes:
        number: of the operation.
        step: number of its step; None if no request decodes.
        first: first step after the last rest; earlier hand-offs come from prompts.
        entered: whether a chunk entered in this operation, in the one before, and so on: one entry for each stage.
        ends: a token is chosen after the chunk that leaves the last stage.
        scored: the positions of that chunk are scored.
        fixed: its step is one of fixed shape: hand-offs arrive in the operation that sends them, so nothing is in
            flight between operations and all steps have the same instructions.
    """

    number: int
    step: int | None
    first: int
    entered: tuple[bool, ...]
    ends: bool = False
    scored: bool = False
    fixed: bool = False


def operation(topology: Topology, stage: int, work: Work) -> tuple[Instruction, ...]:
    """Instructions of one stage up to the step's token on all stages; `ending` follows.

    A stage that waits for the token runs its chunk before it waits. The others have the token published first. A step
    of fixed shape is not included: it runs first, as `fixed_step`.
    """
    before: list[Instruction] = []
    after: list[Instruction] = []
    if work.step is not None:
        before = [*_asking(topology, stage, work.step, WorkPart.STEP), *_body(topology, stage, work.step, work.first)]
        after = list(_token(topology, stage, work.step, WorkPart.STEP))
    if stage == 0 and topology.num_stages > 1:
        before.append(Instruction(Kind.HOST, work.number))
    waits = bool(after) and after[-1].kind is Kind.TOKEN
    before += after[:-1] if waits else after
    return (*before, *_chunk(topology, stage, work), *(after[-1:] if waits else ()))


def fixed_step(topology: Topology, stage: int, step: int, *, chooses: bool = True) -> tuple[Instruction, ...]:
    """Instructions of a step that is one graph.

    With a lag, the receive of a hand-off is posted after this stage has sent its own, and waited for last, so it
    overlaps with the head: all that it depends on was launched before. Without one, the receive comes first: its sender
    waits for nothing that this stage does in the step.

    Args:
        chooses: with the token. Otherwise up to the logits, and `choosing` follows.
    """
    to_logits, to_token = _halves(topology, stage, step)
    found = [*_body(topology, stage, step, step, fixed=True), *to_logits, *(to_token if chooses else ())]
    if stage > 0 and topology.lag:
        found.append(Instruction(Kind.WAIT, step, stage - 1))
    return tuple(found)


def choosing(topology: Topology, stage: int, work: Work) -> tuple[Instruction, ...]:
    """Instructions after a `fixed_step` that does not choose: from the logits to the token on all stages."""
    assert work.step is not None
    return _halves(topology, stage, work.step)[1]


def ending(topology: Topology, stage: int, work: Work) -> tuple[Instruction, ...]:
    """Instructions after `operation`: from the chunk that left the last stage to scores and first token everywhere."""
    entered = work.number - topology.last_stage
    found: list[Instruction] = []
    for part in [WorkPart.SCORES] * work.scored + [WorkPart.CHUNK] * work.ends:
        found += _asking(topology, stage, entered, part)
        found += _token(topology, stage, entered, part)
    return tuple(found)


def rest(topology: Topology, stage: int, work: Work) -> tuple[Instruction, ...]:
    """Instructions in place of an operation that receive all outstanding hand-offs, so that none is in flight."""
    assert work.step is not None
    if stage == 0 or work.fixed:
        return ()
    late = range(max(work.first, work.step - topology.lag), work.step) if topology.lag else ()
    waits = [Instruction(Kind.WAIT, step, stage - 1) for step in late]
    if work.entered[stage]:
        waits.append(Instruction(Kind.WAIT, work.number - stage, stage - 1, WorkPart.CHUNK))
    return tuple(waits)


def _halves(topology: Topology, stage: int, step: int) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
    """What follows the sections of a step, cut after the logits."""
    asking = tuple(_asking(topology, stage, step, WorkPart.STEP))
    token = tuple(_token(topology, stage, step, WorkPart.STEP))
    cut = sum(each.kind not in (Kind.CHOOSE, Kind.PUBLISH, Kind.TOKEN) for each in token)
    if topology.head == "sharded":  # the published tensor is the last output
        return (*asking, *token[:cut]), token[cut:]
    return token[:cut], (*asking, *token[cut:])


def _body(topology: Topology, stage: int, step: int, first: int, *, fixed: bool = False) -> Iterator[Instruction]:
    """The sections of a stage. The first one waits for its memory, or, in a sequential model, for its input."""
    sections = topology.sections(stage)
    if topology.recurrent:
        sections = sections[-1:]
    elif topology.batched:
        sections = range(1)  # one pass does them all
    needed = step - topology.lag
    if stage > 0 and not (fixed and topology.lag):
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
    if stage > 0 and fixed and topology.lag:
        yield Instruction(Kind.EXPECT, step, stage - 1)


def _asking(topology: Topology, stage: int, number: int, part: WorkPart) -> Iterator[Instruction]:
    """Announce the receive of the published tensor early.

    gloo posts it immediately: a message without a posted receive needs CPU time of its sender, which takes milliseconds
    while the sender computes. NCCL posts it at the wait.
    """
    combined_for_all = topology.combined and topology.head == "sharded"
    if stage < topology.last_stage and not combined_for_all:
        yield Instruction(Kind.ASK, number, part=part)


def _chunk(topology: Topology, stage: int, work: Work) -> Iterator[Instruction]:
    """A stage's chunk, and the announcement of the next one, which the stage before runs in this operation."""
    entered, comes = work.number - stage, stage > 0 and work.entered[stage - 1]
    if comes and not work.fixed:
        yield Instruction(Kind.EXPECT, entered + 1, stage - 1, WorkPart.CHUNK)
    if work.entered[stage]:
        if stage > 0 and not work.fixed:
            yield Instruction(Kind.WAIT, entered, stage - 1, WorkPart.CHUNK)
        for section in topology.sections(stage):
            yield Instruction(Kind.FINISH, entered, section, WorkPart.CHUNK)
        if stage < topology.last_stage:
            yield Instruction(Kind.SEND, entered, stage, WorkPart.CHUNK)
    if comes and work.fixed:
        yield Instruction(Kind.EXPECT, entered + 1, stage - 1, WorkPart.CHUNK)
        yield Instruction(Kind.WAIT, entered + 1, stage - 1, WorkPart.CHUNK)


def _token(topology: Topology, stage: int, number: int, part: WorkPart) -> Iterator[Instruction]:
    """From the last section's output to the token on all stages."""
    last = stage == topology.last_stage
    alone = topology.num_stages == 1
    sharded = topology.head == "sharded" and not alone
    if topology.combined:
        yield Instruction(Kind.COMBINE, number, -1 if sharded else topology.last_stage, part)
    elif sharded:
        yield Instruction(Kind.SHARE, number, part=part)
    if last or sharded:
        yield Instruction(Kind.HEAD, number, part=part)
        yield Instruction(Kind.CHOOSE, number, part=part)
    if not alone and not sharded:
        yield Instruction(Kind.PUBLISH if last else Kind.TOKEN, number, part=part)
