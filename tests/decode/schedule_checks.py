"""What every decode schedule must satisfy, checked on a simulated run."""

import itertools
from collections import Counter

from stagdist.decode.runtime.schedule import Kind, WorkPart
from stagdist.decode.topology import Topology
from tests.decode.simulation import (
    CHUNKS_OPEN,
    Mutation,
    Name,
    Operation,
    Pace,
    Placed,
    Run,
    ScheduleError,
    operations,
    program,
    run,
)

RECEIVES = {Kind.ASK, Kind.EXPECT}


def check(topology: Topology, text: str, mutate: Mutation | None = None) -> Run:
    """Everything that a schedule promises.

    Raises:
        ScheduleError: a promise that it breaks.
    """
    placed = program(topology, text, *([mutate] if mutate else []))
    played = run(topology, placed)
    run(topology, placed, Pace(rendezvous=True))
    all_ = operations(topology, text)
    for stage, own in enumerate(placed):
        check_tokens(topology, played, all_, stage)
        check_sections(topology, played, all_, stage)
        check_hand_offs(topology, all_, stage, own)
        check_open_receives(topology, stage, own)
    for edge in played.edges:
        sent = [name for name, _ in edge.sent]
        demand(sent == [name for name, _ in edge.posted], "one receive for each send")
        demand(edge.waited == set(sent), "a rest takes all that was sent")
    return played


def check_fixed(topology: Topology, text: str, mutate: Mutation | None = None) -> Run:
    """What a schedule with steps of fixed shape promises: as `check`, and nothing is in flight between operations.

    Raises:
        ScheduleError: a promise that it breaks.
    """
    placed = program(topology, text, *([mutate] if mutate else []), fixed=True)
    played = run(topology, placed)
    run(topology, placed, Pace(rendezvous=True))
    all_ = operations(topology, text)
    for stage, own in enumerate(placed):
        check_tokens(topology, played, all_, stage)
        check_sections(topology, played, all_, stage)
        for operation in all_:
            mine = [each for each in own if each.operation.work.number == operation.work.number]
            names = {kind: [each.name for each in mine if each.instruction.kind is kind] for kind in Kind}
            demand(names[Kind.EXPECT] == names[Kind.WAIT], f"stage {stage} takes what it expects, in this operation")
            demand(all(name[1] <= operation.work.number for name in names[Kind.WAIT]), "nothing of later operations")
    for edge in played.edges:
        demand([name for name, _ in edge.sent] == [name for name, _ in edge.posted], "one receive for each send")
        demand(edge.waited == {name for name, _ in edge.sent}, "all that was sent is taken")
    return played


def demand(right: bool, promise: str) -> None:
    """Raise where a promise is broken."""
    if not right:
        raise ScheduleError(f"broken: {promise}")


def check_tokens(topology: Topology, played: Run, all_: list[Operation], stage: int) -> None:
    """Each token is chosen once, by the last stage or by all of them, and known to every stage."""
    tokens = [token for operation in all_ for token in operation.tokens]
    own, sharded = played.known[stage], topology.head == "sharded"
    chooses = stage == topology.last_stage or sharded
    demand(own.chosen == (tokens if chooses else []), f"stage {stage} chooses each token once")
    publishes = stage == topology.last_stage > 0 and not sharded
    demand(own.published == (tokens if publishes else []), f"stage {stage} publishes each token once")
    demand(own.tokens == set(tokens), f"stage {stage} knows every token")
    demand(own.asked == own.answered, f"stage {stage} gets what it asked the last stage for")


def check_sections(topology: Topology, played: Run, all_: list[Operation], stage: int) -> None:
    """Each section runs once in every step, and for every chunk that no rest stops."""
    expected: Counter[tuple[Name, int]] = Counter()
    for operation in all_:
        sections = list(topology.sections(stage))
        if operation.text == "R":
            continue
        if operation.work.entered[stage]:
            expected.update(((WorkPart.CHUNK, operation.work.number - stage), section) for section in sections)
        if operation.work.step is not None:
            sections = sections[-1:] if topology.recurrent else [0] if topology.batched else sections
            expected.update(((WorkPart.STEP, operation.work.step), section) for section in sections)
    demand(Counter(played.known[stage].finished) == expected, f"stage {stage} runs every section once")


def check_hand_offs(topology: Topology, all_: list[Operation], stage: int, own: list[Placed]) -> None:
    """One send for each output, at once; no rank waits for a hand-off before its time."""
    counts: dict[int, Counter[Kind]] = {operation.work.number: Counter() for operation in all_}
    of_operation: dict[int, list[Placed]] = {operation.work.number: [] for operation in all_}
    for placed, following in itertools.zip_longest(own, own[1:]):
        instruction, work = placed.instruction, placed.operation.work
        counts[work.number][instruction.kind] += 1
        of_operation[work.number].append(placed)
        if placed.operation.text == "R":
            demand(instruction.kind is Kind.WAIT, "a rest only receives")
        elif instruction.kind is Kind.WAIT and instruction.part is WorkPart.STEP:
            assert work.step is not None
            lag = work.step - instruction.number
            demand(lag == topology.lag, f"stage {stage}: the hand-off is first needed {topology.lag} steps later")
        elif instruction.kind is Kind.WAIT:
            demand(work.number - instruction.number == stage, "a chunk is one operation old when it is needed")
        if instruction.kind is Kind.FINISH and stage < topology.last_stage:
            if instruction.index == topology.sections(stage)[-1]:
                demand(following.instruction.kind is Kind.SEND, f"stage {stage} sends what it has at once")
    for operation in all_:
        work, count = operation.work, counts[operation.work.number]
        steps = int(operation.text.startswith("s"))
        runs = operation.text != "R"
        demand(
            count[Kind.SEND] == (steps + (runs and work.entered[stage]) if stage < topology.last_stage else 0),
            "one send for each output",
        )
        demand(
            count[Kind.EXPECT] == (steps + (runs and work.entered[stage - 1]) if stage > 0 else 0),
            "one receive for each send",
        )
        if steps:
            check_order(topology, stage, of_operation[work.number])


def check_order(topology: Topology, stage: int, own: list[Placed]) -> None:
    """Order of an operation with a step.

    Receives of the step come first, what needs no memory runs before it is waited for, and the chunk runs before this
    stage waits for the token, or after it has published it.
    """
    kinds = [each.instruction.kind for each in own if each.instruction.part is WorkPart.STEP]
    begin = kinds.index(Kind.BEGIN)
    demand(not set(kinds[begin:]) & RECEIVES, f"stage {stage}: receives come first")
    if topology.lag:
        demand(set(kinds[:begin]) <= RECEIVES, f"stage {stage} begins before it waits")
    both = [(each.instruction.part, each.instruction.kind) for each in own]
    if (WorkPart.CHUNK, Kind.FINISH) in both:
        chunk = both.index((WorkPart.CHUNK, Kind.FINISH))
        waits, publishes = (WorkPart.STEP, Kind.TOKEN), (WorkPart.STEP, Kind.PUBLISH)
        demand(waits not in both or chunk < both.index(waits), f"stage {stage} runs its chunk before it waits")
        demand(publishes not in both or chunk > both.index(publishes), f"stage {stage} publishes before its chunk")


def check_open_receives(topology: Topology, stage: int, own: list[Placed]) -> None:
    """Wherever an error may end a stage, no more receives are open than there are buffers; none after a rest."""
    steps = chunks = 0
    for place, placed in enumerate(own):
        change = {Kind.EXPECT: 1, Kind.WAIT: -1}.get(placed.instruction.kind, 0)
        if placed.instruction.part is WorkPart.STEP:
            steps += change
        else:
            chunks += change
        demand(0 <= steps <= topology.lag + 1, f"stage {stage} has {topology.lag + 1} buffers")
        demand(0 <= chunks <= CHUNKS_OPEN, f"stage {stage} has {CHUNKS_OPEN} chunks open at most")
        end = place + 1 == len(own) or own[place + 1].operation is not placed.operation
        if end and placed.operation.text == "R":
            demand(steps == chunks == 0, f"stage {stage} is at rest")
