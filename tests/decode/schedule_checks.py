"""What every decode schedule must satisfy, checked on a simulated run."""

import itertools
from collections import Counter

from stagdist.decode.runtime.schedule import Kind
from stagdist.decode.topology import Topology
from tests.decode.simulation import (
    CHUNKS_OPEN,
    REST,
    STEP,
    Mutation,
    Operation,
    Pace,
    Placed,
    Run,
    ScheduleError,
    program,
    run,
)

RECEIVES = {Kind.ASK, Kind.EXPECT}


def check(topology: Topology, operations: list[Operation], mutate: Mutation | None = None) -> Run:
    """Everything that a schedule promises.

    Raises:
        ScheduleError: a promise that it breaks.
    """
    placed = program(topology, operations, *([mutate] if mutate else []))
    played = run(topology, placed)
    run(topology, placed, Pace(rendezvous=True))
    for stage, own in enumerate(placed):
        check_tokens(topology, played, operations, stage)
        check_sections(topology, played, operations, stage)
        check_hand_offs(topology, operations, stage, own)
        check_open_receives(topology, stage, own)
    return played


def demand(right: bool, promise: str) -> None:
    """Raise where a promise is broken."""
    if not right:
        raise ScheduleError(f"broken: {promise}")


def check_tokens(topology: Topology, played: Run, operations: list[Operation], stage: int) -> None:
    """One token for each operation, chosen by the last stage or by all of them, known to every stage."""
    with_token = [number for number, operation in enumerate(operations) if operation is not REST]
    own, sharded = played.known[stage], topology.head == "sharded"
    chooses = stage == topology.last_stage or sharded
    demand(own.chosen == (with_token if chooses else []), f"stage {stage} chooses each token once")
    publishes = stage == topology.last_stage > 0 and not sharded
    demand(own.published == (with_token if publishes else []), f"stage {stage} publishes each token once")
    demand(own.tokens == set(with_token), f"stage {stage} knows every token")
    demand(own.asked == own.answered, f"stage {stage} gets what it asked the last stage for")


def check_sections(topology: Topology, played: Run, operations: list[Operation], stage: int) -> None:
    """Each section runs once in every step and for every chunk."""
    expected: Counter[tuple[int, int, int]] = Counter()
    step = 0
    for number, operation in enumerate(operations):
        sections = list(topology.sections(stage))
        if operation is STEP:
            sections = sections[-1:] if topology.recurrent else [0] if topology.batched else sections
        parts = range(operation.chunks) if operation.kind == "prefill" else range(step, step + (operation is STEP))
        expected.update((number, part, section) for part in parts for section in sections)
        step += operation is STEP
    demand(Counter(played.known[stage].finished) == expected, f"stage {stage} runs every section once")


def check_hand_offs(topology: Topology, operations: list[Operation], stage: int, own: list[Placed]) -> None:
    """Sends equal receives in every operation; no rank waits for a hand-off before its time; none is held back."""
    counts: dict[int, Counter[Kind]] = {number: Counter() for number in range(len(operations))}
    for placed, following in itertools.zip_longest(own, own[1:]):
        counts[placed.operation][placed.instruction.kind] += 1
        if placed.kind_of_operation == "rest":
            demand(placed.instruction.kind is Kind.WAIT, "a rest only receives")
        if placed.kind_of_operation == "step" and placed.instruction.kind is Kind.WAIT:
            step = [each for each in own if each.operation == placed.operation and each.instruction.kind is Kind.BEGIN]
            lag = step[0].instruction.step - placed.instruction.step
            demand(lag == topology.lag, f"stage {stage}: the hand-off is first needed {topology.lag} steps later")
        if following is not None and placed.instruction.kind is Kind.FINISH and stage < topology.last_stage:
            if placed.instruction.index == topology.sections(stage)[-1]:
                demand(following.instruction.kind is Kind.SEND, f"stage {stage} sends what it has at once")
    for number, operation in enumerate(operations):
        each = operation.chunks or int(operation is STEP)
        demand(counts[number][Kind.SEND] == (each if stage < topology.last_stage else 0), "one send for each output")
        demand(counts[number][Kind.EXPECT] == (each if stage > 0 else 0), "one receive for each send")
        check_order(topology, stage, [each.instruction.kind for each in own if each.operation == number], operation)


def check_order(topology: Topology, stage: int, kinds: list[Kind], operation: Operation) -> None:
    """Receives are posted before anything else in a step, and what needs no memory runs before it is waited for."""
    if operation is not STEP:
        return
    begin = kinds.index(Kind.BEGIN)
    demand(not set(kinds[begin:]) & RECEIVES, f"stage {stage}: receives come first")
    if topology.lag:
        demand(set(kinds[:begin]) <= RECEIVES, f"stage {stage} begins before it waits")


def check_open_receives(topology: Topology, stage: int, own: list[Placed]) -> None:
    """Wherever an error may end a stage, no more receives are open than there are buffers; none after a rest."""
    steps = chunks = 0
    for place, placed in enumerate(own):
        change = {Kind.EXPECT: 1, Kind.WAIT: -1}.get(placed.instruction.kind, 0)
        if placed.key[0] == "step":
            steps += change
        else:
            chunks += change
        demand(0 <= steps <= topology.lag + 1, f"stage {stage} has {topology.lag + 1} buffers")
        demand(0 <= chunks <= CHUNKS_OPEN, f"stage {stage} has {CHUNKS_OPEN} chunks open at most")
        end = place + 1 == len(own) or own[place + 1].operation != placed.operation
        if end:
            demand(chunks == 0, f"stage {stage} leaves no chunk open after a prefill")
        if end and placed.kind_of_operation == "rest":
            demand(steps == 0, f"stage {stage} is at rest")
