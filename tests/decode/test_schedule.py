"""The schedule of decoding as data: no process, no tensor. Every stage's instructions are played against each other."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.schedule import Instruction, Kind, Work, WorkPart
from stagdist.decode.topology import HEAD_LAYOUTS, Topology
from stagdist.errors import ConfigError
from tests.decode.schedule_checks import check, check_fixed
from tests.decode.simulation import CHUNKS_OPEN, Mutation, Name, Pace, ScheduleError, program, run

SHAPES = [(sections, stages) for sections in range(1, 9) for stages in range(1, sections + 1) if sections % stages == 0]
SLOW = ((5, 1), (5, 5), (6, 1), (6, 2), (6, 6), (7, 1), (7, 7), (8, 8))
"""Shapes that `make test` leaves out: others with fewer sections have stages of the same kinds."""
PROGRAMS: dict[str, str] = {
    "prompts": "e ~ c e ~ c c e ~ R",
    "prompts that follow each other": "c e c e e c c c e ~ R",
    "steps": "e ~ s s s s s s R",
    "prompts beside steps": "c e ~ s sc sc se s s se sc s sc s~ s s R",
    "scored prompts": "x y ~ s sx sx sy s~ y ~ s s R",
    "a cancelled prompt": "e ~ s sc sc s~ s sc se s~ R",
    "the end while prompts are on their way": "e ~ s sc s se se R",
    "the end of prompts alone": "c c e R",
    "mixed": "c e ~ s s c c e ~ s e ~ s s s R R e ~ s R s R",
}


def topologies(sections: int, stages: int) -> Iterator[Topology]:
    """Every schedule of so many sections on so many stages."""
    for head, combined in itertools.product(HEAD_LAYOUTS, (False, True) if sections > 1 else (False,)):
        for stagger in (0, 1, 2):
            yield Topology(sections, stages, True, stagger, combined, head)
            if stages == 1 and sections > 1 and stagger:
                yield Topology(sections, stages, True, stagger, combined, head, batched=True)
                if sections == 2 and not combined:
                    yield Topology(sections, stages, True, stagger, combined, head, recurrent=True)
        if not combined:
            yield Topology(sections, stages, False, 1, combined, head)


@pytest.mark.parametrize(
    ("sections", "stages"), [pytest.param(*shape, marks=[pytest.mark.slow] * (shape in SLOW)) for shape in SHAPES]
)
def test_no_stage_waits_for_what_is_sent_later_and_every_token_is_computed_once(sections: int, stages: int) -> None:
    for topology, text in itertools.product(topologies(sections, stages), PROGRAMS.values()):
        check(topology, text)


@pytest.mark.parametrize(
    ("sections", "stages"), [pytest.param(*shape, marks=[pytest.mark.slow] * (shape[0] > 4)) for shape in SHAPES]
)
def test_steps_of_fixed_shape_leave_nothing_in_flight_between_operations(sections: int, stages: int) -> None:
    for topology, text in itertools.product(topologies(sections, stages), PROGRAMS.values()):
        check_fixed(topology, text)


@pytest.mark.parametrize(("sections", "stages"), [shape for shape in SHAPES if shape[1] > 1])
def test_what_was_sent_before_a_rest_is_taken_by_it(sections: int, stages: int) -> None:
    for topology in topologies(sections, stages):
        without = run(topology, program(topology, "e ~ s s s s"))
        open_now = {len(edge.posted) - len(edge.waited) for edge in without.edges}
        assert open_now == {topology.lag}
        short = run(topology, program(topology, "e ~ s sc R"))
        assert {len(edge.posted) - len(edge.waited) for edge in short.edges} == {0}


@pytest.mark.parametrize("stages", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_when_a_stage_dies_the_others_come_to_a_halt_with_few_hand_offs_open(stages: int) -> None:
    text = "c e ~ s s sc se s s s s"
    for topology in topologies(stages, stages):
        placed = program(topology, text)
        tokens = len(run(topology, placed).known[0].tokens)
        for dead in range(stages):
            for place in range(len(placed[dead])):
                played = run(topology, placed, Pace(dies=(dead, place)))
                # A token needs all stages in the end, so the others cannot run away from the dead one.
                # One of their operations may choose two: that of a step and the first one of a prompt.
                reach = (topology.last_stage - dead) * topology.lag + 2
                done = len(played.known[dead].tokens)
                assert max(len(known.tokens) for known in played.known) <= done + reach
                if done + reach < tokens:
                    assert len(played.stuck) == stages, "a stage came to the end without the dead one"
                for edge in played.edges:
                    open_receives = max(0, len(edge.posted) - len(edge.waited))
                    assert open_receives <= topology.lag + 1 + CHUNKS_OPEN
                    assert len(edge.sent) - len(edge.posted) <= topology.lag + 1 + CHUNKS_OPEN


def test_sections_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 stages cannot hold 3 sections"):
        Topology(3, 2)


# --- how long a step takes --------------------------------------------------------------------------------------

BEGIN_S, HEAD_S, CHOOSE_S, TOKEN_S = 1.0, 3.0, 0.5, 0.25


def pace(finish: list[float], hand_off_s: float = 0.0) -> Pace:
    """Durations of the parts of a step; `finish` is the time of each section after its beginning."""

    def duration(stage: int, instruction: Instruction) -> float:
        match instruction.kind:
            case Kind.BEGIN:
                return BEGIN_S
            case Kind.FINISH:
                return finish[instruction.index]
            case Kind.HEAD:
                return HEAD_S
            case Kind.CHOOSE:
                return CHOOSE_S
        return 0.0

    return Pace(duration, hand_off_s, TOKEN_S)


def step_time(topology: Topology, finish: list[float], hand_off_s: float = 0.0) -> float:
    """Mean time of a step once all is in its rhythm."""
    steps, warm_up = 180, 60
    played = run(topology, program(topology, "e ~" + " s" * steps), pace(finish, hand_off_s))
    moments = played.token_s[topology.last_stage]
    return (moments[step(steps - 1)] - moments[step(warm_up - 1)]) / (steps - warm_up)


def step(number: int) -> Name:
    """The token of a step."""
    return WorkPart.STEP, number


def own_time(topology: Topology, finish: list[float], stage: int) -> float:
    """What a stage computes in a step, its way to the token included."""
    own = BEGIN_S + finish[stage]
    return own + HEAD_S + CHOOSE_S + TOKEN_S if stage == topology.last_stage else own


SPLITS = [[9.0, 5.0], [5.0, 9.0], [8.5, 5.0], [7.0, 7.0, 4.0], [4.0, 9.0, 3.0, 2.0], [3.0] * 8]


@pytest.mark.parametrize("finish", SPLITS)
@pytest.mark.parametrize("stagger", [1, 2])
def test_a_step_takes_as_long_as_the_slowest_stage_alone(finish: list[float], stagger: int) -> None:
    topology = Topology(len(finish), len(finish), stagger=stagger)
    expected = max(own_time(topology, finish, stage) for stage in range(len(finish)))
    assert step_time(topology, finish) == pytest.approx(expected)


@pytest.mark.parametrize("finish", SPLITS)
def test_the_sequential_baseline_and_stagger_0_take_the_sum_of_their_stages(finish: list[float]) -> None:
    stages, after = len(finish), HEAD_S + CHOOSE_S + TOKEN_S
    for delay in (0.0, 2.0):
        way = sum(finish) + (stages - 1) * delay + after
        baseline = Topology(stages, stages, staggered=False)
        assert step_time(baseline, finish, delay) == pytest.approx(way + stages * BEGIN_S)
        # Without stagger only the first self-attention overlaps.
        assert step_time(Topology(stages, stages, stagger=0), finish, delay) == pytest.approx(way + BEGIN_S)


@pytest.mark.parametrize("finish", SPLITS)
def test_a_sharded_head_waits_for_the_slowest_section(finish: list[float]) -> None:
    topology = Topology(len(finish), len(finish), head="sharded")
    expected = BEGIN_S + max(finish) + HEAD_S + CHOOSE_S
    if finish[-1] == max(finish):  # else the last section's output is shared while slower stages still compute
        assert step_time(topology, finish) == pytest.approx(expected)
    else:
        assert step_time(topology, finish) <= expected + 1e-9


def bound(topology: Topology, finish: list[float], delay: float) -> float:
    """Step time by the longest circle of dependencies: from a token through k hand-offs to the token k lag + 1 on."""
    last, circles = topology.last_stage, [own_time(topology, finish, stage) for stage in range(len(finish))]
    for stage in range(last):
        hops = last - stage
        work = BEGIN_S + sum(finish[stage:]) + hops * delay + HEAD_S + CHOOSE_S + TOKEN_S
        circles.append(work / (hops * topology.lag + 1))
    return max(circles)


@pytest.mark.parametrize("finish", [*SPLITS[:-1], pytest.param(SPLITS[-1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("stagger", [1, 2])
def test_step_time_is_flat_while_the_hand_off_hides_and_then_grows_linearly(finish: list[float], stagger: int) -> None:
    topology = Topology(len(finish), len(finish), stagger=stagger)
    for delay in (0.0, 1.0, 5.0, 10.0, 20.0, 40.0, 80.0):
        assert step_time(topology, finish, delay) == pytest.approx(bound(topology, finish, delay), rel=1e-2)


@pytest.mark.parametrize("finish", [[8.75, 5.0], [6.0, 5.0]])
def test_stagger_2_hides_a_hand_off_that_is_one_whole_step_slower(finish: list[float]) -> None:
    one, two = (Topology(2, 2, stagger=stagger) for stagger in (1, 2))
    flat = step_time(one, finish)
    # From the end of stage 0 to the end of the next step's first self-attention on stage 1.
    slack = flat - own_time(one, finish, 0) + BEGIN_S
    for topology, hidden in ((one, slack), (two, slack + flat)):
        assert step_time(topology, finish, hidden) == pytest.approx(flat)
        beyond = [step_time(topology, finish, hidden + extra) - flat for extra in (3.0, 6.0)]
        assert beyond == pytest.approx([3.0 / (topology.lag + 1), 6.0 / (topology.lag + 1)], rel=0.02)


def test_prefill_of_many_chunks_keeps_all_stages_busy() -> None:
    finish, chunks = [10.0, 10.0, 10.0], 20
    topology = Topology(3, 3)
    played = run(topology, program(topology, "c " * (chunks - 1) + "e ~"), pace(finish))
    after = HEAD_S + CHOOSE_S + TOKEN_S
    assert played.token_s[0][WorkPart.CHUNK, chunks - 1] == pytest.approx((chunks + 2) * 10.0 + after)


@pytest.mark.parametrize("finish", SPLITS)
@pytest.mark.parametrize("stagger", [1, 2])
def test_a_step_beside_a_chunk_takes_as_long_as_both_on_the_slowest_stage(finish: list[float], stagger: int) -> None:
    topology, beside = Topology(len(finish), len(finish), stagger=stagger), 60
    played = run(topology, program(topology, "e ~" + " sc" * beside), pace(finish))
    moments = played.token_s[0]
    both = max(own_time(topology, finish, stage) + finish[stage] for stage in range(len(finish)))
    assert (moments[step(beside - 1)] - moments[step(20)]) / (beside - 21) == pytest.approx(both)


# --- the checks notice what is wrong ----------------------------------------------------------------------------


def without(kind: Kind, at_stage: int) -> Mutation:
    """A schedule in which a stage leaves out an instruction."""
    return lambda stage, instructions: [each for each in instructions if stage != at_stage or each.kind is not kind]


def moved(kind: Kind, behind: Kind, at_stage: int) -> Mutation:
    """A schedule in which a stage does something only after something else."""

    def mutate(stage: int, instructions: list[Instruction]) -> list[Instruction]:
        kinds = [each.kind for each in instructions]
        if stage != at_stage or kind not in kinds or behind not in kinds:
            return instructions
        late = [each for each in instructions if each.kind is kind and each.part is WorkPart.STEP]
        rest = [each for each in instructions if each not in late]
        place = max(place for place, each in enumerate(rest) if each.kind is behind) + 1
        return rest[:place] + late + rest[place:]

    return mutate


def waiting_for_this_step(stage: int, instructions: list[Instruction]) -> list[Instruction]:
    """A schedule whose stages wait for the hand-off of the present step."""
    step = max((each.number for each in instructions if each.kind is Kind.BEGIN), default=None)
    return [
        replace(each, number=step)
        if (each.kind, each.part) == (Kind.WAIT, WorkPart.STEP) and step is not None
        else each
        for each in instructions
    ]


def twice(kind: Kind) -> Mutation:
    """A schedule in which something is done again."""
    return lambda stage, instructions: [
        copy for each in instructions for copy in ([each, each] if each.kind is kind else [each])
    ]


TWO, COMBINED = Topology(2, 2), Topology(2, 2, combined=True)
THREE_SHARDED = Topology(3, 3, head="sharded")
BROKEN: dict[str, tuple[Topology, Mutation, str]] = {
    "waits for the hand-off of the same step": (TWO, waiting_for_this_step, "without the hand-off"),
    "waits in a circle": (Topology(2, 2, stagger=0), moved(Kind.SEND, Kind.TOKEN, 0), "waits at"),
    "no receive": (TWO, without(Kind.EXPECT, 1), "not expected"),
    "no send": (TWO, without(Kind.SEND, 0), "waits at"),
    "no wait": (TWO, without(Kind.WAIT, 1), "without the hand-off"),
    "a send after the token": (Topology(3, 3), moved(Kind.SEND, Kind.TOKEN, 1), "waits at|at once|receives"),
    "a send after the publication": (Topology(3, 3), moved(Kind.SEND, Kind.HOST, 0), "at once"),
    "a receive after its wait": (TWO, moved(Kind.EXPECT, Kind.WAIT, 1), "not expected|come first|leaves no chunk"),
    "a publication before the choice": (TWO, moved(Kind.CHOOSE, Kind.PUBLISH, 1), "without a token"),
    "nobody publishes": (TWO, without(Kind.PUBLISH, 1), "without the token before"),
    "nobody shares": (THREE_SHARDED, without(Kind.SHARE, 2), "without the combined"),
    "a token that was not asked for": (TWO, without(Kind.ASK, 0), "without having asked"),
    "a token asked for twice": (TWO, twice(Kind.ASK), "asked for already"),
    "a token asked for late": (TWO, moved(Kind.ASK, Kind.SEND, 0), "receives come first"),
    "a stage does not take the token": (TWO, without(Kind.TOKEN, 0), "asked for already|without the token"),
    "a token chosen twice": (TWO, twice(Kind.CHOOSE), "chooses each token once"),
    "a section run twice": (TWO, twice(Kind.FINISH), "runs every section once|at once"),
    "a stage that does not combine": (COMBINED, without(Kind.COMBINE, 0), "waits at"),
    "a stage without its part of the head": (THREE_SHARDED, without(Kind.CHOOSE, 1), "without the token before"),
    "a head before the last output is shared": (THREE_SHARDED, moved(Kind.SHARE, Kind.HEAD, 0), "without the combined"),
    "memory before the first self-attention": (TWO, moved(Kind.BEGIN, Kind.WAIT, 1), "begins before it waits"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_schedule_is_noticed(name: str) -> None:
    topology, mutate, complaint = BROKEN[name]
    check(topology, PROGRAMS["mixed"])
    with pytest.raises(ScheduleError, match=complaint):
        check(topology, PROGRAMS["mixed"], mutate)


BROKEN_FIXED: dict[str, tuple[Topology, Mutation, str]] = {
    "a hand-off left for the next step": (TWO, without(Kind.WAIT, 1), "without the hand-off"),
    "no receive": (TWO, without(Kind.EXPECT, 1), "not expected"),
    "the token before a hand-off that is waited for": (
        Topology(2, 2, stagger=0),
        moved(Kind.SEND, Kind.TOKEN, 0),
        "at",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FIXED)
def test_a_broken_schedule_of_fixed_shape_is_noticed(name: str) -> None:
    topology, mutate, complaint = BROKEN_FIXED[name]
    check_fixed(topology, PROGRAMS["mixed"])
    with pytest.raises(ScheduleError, match=complaint):
        check_fixed(topology, PROGRAMS["mixed"], mutate)


def test_a_rest_that_leaves_a_hand_off_behind_is_noticed() -> None:
    def lazy(stage: int, instructions: list[Instruction]) -> list[Instruction]:
        return [] if all(each.kind is Kind.WAIT for each in instructions) else instructions

    with pytest.raises(ScheduleError, match="without the hand-off|buffers|one receive|at rest"):
        check(TWO, PROGRAMS["mixed"], lazy)


def test_stages_that_hold_several_sections_wait_once_in_a_step() -> None:
    instructions = schedule.operation(Topology(8, 2), 1, Work(0, 5, 0, (False, False)))
    assert [each.kind for each in instructions].count(Kind.WAIT) == 1
    assert [each.index for each in instructions if each.kind is Kind.FINISH] == [4, 5, 6, 7]
