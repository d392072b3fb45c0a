"""Decoding under NCCL's rules: no layout hangs, and negative controls do."""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.warm_up import dry_pass
from stagdist.decode.topology import HEAD_LAYOUTS
from tests.parallel.nccl_decoding import Layout, alike, any_keys, programs, recorded
from tests.parallel.nccl_rules import COMPUTE, Collective, Launch, Machine, Program, QueueOf, Receive, Send, Stream
from tests.parallel.recording import EARLY, KEYS, Recorder

FEW_STAGES = (1, 2, 3, 4)
"""With the dry pass, every kernel chosen by shape, and no room in buffers; more stages take too long to record so."""
MORE_STAGES = (5, 8)
WORLD = 0
"""The communicator of all ranks."""


def slow_but(every: Sequence[int], *usual: int) -> list[Any]:
    """Parameters of a test, of which `make test` runs the usual ones; the others go through the same code."""
    return [number if number in usual else pytest.param(number, marks=pytest.mark.slow) for number in every]


def layouts(stages: int) -> list[Layout]:
    """Every way to decode on a number of stages. A single stage has two tensor ranks, to have peers."""
    tensor = 2 if stages == 1 else 1
    staggered = [
        Layout(stages, stagger, head, combined, tensor)
        for stagger, head, combined in itertools.product((0, 1, 2), HEAD_LAYOUTS, (False, True))
    ]
    return [*staggered, *(Layout(stages, None, head, tensor=tensor) for head in HEAD_LAYOUTS)]


MORE = [
    *(Layout(2, 1, head, combined, tensor=2) for head in HEAD_LAYOUTS for combined in (False, True)),
    Layout(2, each=2),
]


def round_robin(queues: int) -> QueueOf:
    """The hardware queue of each stream, in the order of creation."""
    return lambda stream: 0 if stream == COMPUTE else int(str(stream)) % queues


def together(first: Stream, second: Stream) -> QueueOf:
    """Two streams on one hardware queue."""

    def queue_of(stream: Stream) -> Hashable:
        return "shared" if stream in (first, second) else stream

    return queue_of


def streams(ranks: Sequence[Program]) -> list[Stream]:
    """All streams in use."""
    groups = {action.group for each in ranks for action in each if isinstance(action, Send | Receive | Collective)}
    return [COMPUTE, *sorted(groups, key=str)]


def does_not_hang(layout: Layout) -> None:
    """Simulate a layout with the released settings."""
    ranks = programs(layout)
    assert not Machine(ranks).play(), f"{layout}: kernels that load at their first launch"
    assert not Machine(ranks, synchronize=True).play(), f"{layout}: a host that waits after every action"
    assert not Machine(ranks, queue_of=round_robin(8)).play(), f"{layout}: 8 queues"
    stuck = Machine(any_keys(ranks), buffered=False, queue_of=round_robin(32)).play()
    assert not stuck, f"{layout}: messages without room in buffers, 32 queues"
    assert not Machine(ranks, buffered=False).play(), f"{layout}: attention over other keys is another kernel"


# Those of two stages have two tensor ranks too.
@pytest.mark.parametrize("stages", slow_but(FEW_STAGES, 2))
def test_no_layout_hangs(stages: int) -> None:
    for layout in [*layouts(stages), *(MORE if stages == 2 else [])]:
        does_not_hang(layout)


@pytest.mark.parametrize("stagger", [None, 1])
def test_no_layout_with_a_stage_between_hangs(stagger: int | None) -> None:
    """The stagger of 1 and the sequential model: the test above has every stagger."""
    for layout in layouts(3):
        if layout.stagger == stagger:
            does_not_hang(layout)


CAPTURED = [
    Layout(2, 0),
    Layout(2, 1),
    Layout(2, 2, "sharded"),
    Layout(2, 1, "sharded", combined=True),
    Layout(2, None),
]
"""What `make test` runs of captured steps."""


@pytest.mark.parametrize("layout", CAPTURED, ids=str)
def test_no_layout_of_captured_steps_hangs(layout: Layout) -> None:
    does_not_hang(replace(layout, captured=True, slots=2))


@pytest.mark.slow
@pytest.mark.parametrize("stages", FEW_STAGES)
def test_no_layout_of_captured_steps_on_any_number_of_stages_hangs(stages: int) -> None:
    for layout in [*layouts(stages), *(MORE if stages == 2 else [])]:
        does_not_hang(replace(layout, captured=True, slots=2))


@pytest.mark.parametrize("stages", slow_but((2, 3), 2))
def test_no_traced_layout_hangs(stages: int) -> None:
    for layout in layouts(stages):
        does_not_hang(replace(layout, traced=True))


@pytest.mark.slow  # stages beyond three are of no other kind, and the next test has eight
@pytest.mark.parametrize("stages", MORE_STAGES)
def test_no_layout_of_many_stages_hangs(stages: int) -> None:
    for layout in layouts(stages):
        ranks = programs(layout, dry=False)
        assert not Machine(ranks).play(), f"{layout}: kernels that load at their first launch"
        assert not Machine(ranks, buffered=False, lazy=False).play(), f"{layout}: messages without room in buffers"
        assert not Machine(ranks, synchronize=True).play(), f"{layout}: a host that waits after every action"
        for queues in (8, 32):
            assert not Machine(ranks, lazy=False, queue_of=round_robin(queues)).play(), f"{layout}: {queues} queues"


@pytest.mark.parametrize("stages", slow_but((5, 6, 7, 8), 8))
def test_no_sharded_head_of_many_stages_hangs(stages: int) -> None:
    does_not_hang(Layout(stages, 1, "sharded", combined=True))


# --- hardware queues --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", slow_but((2, 3, 4), 2))
def test_any_two_streams_may_share_a_hardware_queue_where_messages_have_room_in_buffers(stages: int) -> None:
    for layout in layouts(stages):
        ranks = programs(layout)
        for pair in itertools.combinations(streams(ranks), 2):
            assert not Machine(ranks, queue_of=together(*pair)).play(), f"{layout}: {pair} share a queue"


@pytest.mark.parametrize("stages", slow_but((2, 3, 4), 2))
def test_a_staggered_hand_off_without_room_in_buffers_must_not_share_a_hardware_queue(stages: int) -> None:
    """It completes in the next step, after all work of its rank in this step: hence 32 queues."""
    for layout in layouts(stages):
        ranks = programs(layout)
        pairs = list(itertools.combinations(streams(ranks), 2))
        hanging = {
            pair for pair in pairs if Machine(ranks, buffered=False, lazy=False, queue_of=together(*pair)).play()
        }
        edges = hand_offs(ranks)
        if not layout.stagger:  # only chunks of prompts complete in the next operation
            assert all(set(pair) & edges for pair in hanging), layout
        elif layout.combined or layout.head == "sharded":  # all stages meet in every step
            unused = {WORLD} if layout.head == "last" else {tokens(ranks)} if layout.combined else set()
            with_others = {pair for pair in pairs if len(set(pair) & edges) == 1 and not set(pair) & unused}
            assert hanging == with_others, layout
        else:
            with_tokens = {pair for pair in pairs if len(set(pair) & edges) == 1 and tokens(ranks) in pair}
            assert with_tokens <= hanging and all(set(pair) & edges for pair in hanging), layout


def hand_offs(ranks: Sequence[Program]) -> set[Stream]:
    """The communicators from one stage to the next."""
    return {
        action.group
        for rank, each in enumerate(ranks)
        for action in each
        if isinstance(action, Send) and action.peer == rank + 1
    }


def tokens(ranks: Sequence[Program]) -> Stream:
    """The communicator from the last stage to all others."""
    return next(action.group for action in ranks[0] if isinstance(action, Receive))


def test_one_hardware_queue_hangs() -> None:
    ranks = programs(Layout(2, 1))
    stuck = Machine(ranks, buffered=False, lazy=False, queue_of=lambda stream: 0).play()
    assert len(stuck) == 2, "one queue works: allow it"


# --- the dry pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", [Layout(2, 2, "sharded"), Layout(3, 0, combined=True), Layout(2, None), Layout(2, tensor=2)], ids=str
)
def test_the_dry_pass_loads_all_but_chunks_of_other_lengths_and_attention_over_other_keys(layout: Layout) -> None:
    loaded: list[set[str]] = []

    def noting(recorder: Recorder, stage: Stage) -> None:
        dry_pass(stage)
        loaded.append(set(recorder.loaded))

    for recorder, before in zip(recorded(layout, dry_pass=noting), loaded, strict=True):
        later = recorder.loaded - before
        chunk = {name for name in later if "[(1, 3, " in name}
        assert chunk and all(KEYS in name for name in later - chunk)


@pytest.mark.parametrize(
    ("layout", "other"),
    [
        (Layout(1, None, "sharded", tensor=2), Layout(1, tensor=2)),
        (Layout(3, 2), Layout(3)),
        (Layout(3, 2, "sharded", combined=True), Layout(3, 1, "sharded", combined=True)),
    ],
    ids=str,
)
def test_stages_that_are_alike_have_the_same_dry_pass(layout: Layout, other: Layout) -> None:
    kernels: dict[Hashable, list[list[str]]] = {}

    def noting(recorder: Recorder, stage: Stage, of: Layout) -> None:
        begin = len(recorder.program)
        dry_pass(stage)
        launched = [action.name for action in recorder.program[begin:] if isinstance(action, Launch)]
        kernels.setdefault((alike(of, stage.index), recorder.rank % of.tensor), []).append(launched)

    for each in (layout, other):
        recorded(each, dry_pass=partial(noting, of=each))
    assert any(len(found) > 1 for found in kernels.values())
    assert all(one == found[0] for found in kernels.values() for one in found)


def test_without_the_dry_pass_a_message_without_room_in_buffers_hangs_a_sharded_head() -> None:
    assert Machine(programs(Layout(2, 1, "sharded"), dry=False), buffered=False).play()
    assert not Machine(programs(Layout(2, 1, "sharded")), buffered=False).play()


# --- negative controls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("stagger", [None, 0, 1, 2])
def test_receives_posted_early_hang_when_kernels_are_loaded(stages: int, stagger: int | None) -> None:
    ranks = programs(Layout(stages, stagger), rules=EARLY)
    stuck = Machine(ranks).play()
    assert len(stuck) == stages and "its host at Launch" in stuck[0] and "its device at Receive" in stuck[0]
    assert Machine(ranks, synchronize=True, lazy=False).play(), "a tracer that synchronizes"
    assert not Machine(ranks, lazy=False).play(), "with all kernels loaded"


@pytest.mark.parametrize("stagger", [0, 1, 2])
def test_tokens_on_the_communicator_of_sums_hang_when_posted_early(stagger: int) -> None:
    def merged(ranks: list[Program]) -> list[Program]:
        sums = next(action.group for action in ranks[0] if isinstance(action, Collective) and action.group != WORLD)
        tokens = next(action.group for action in ranks[0] if isinstance(action, Receive))
        return [
            [
                type(action)(sums, action.peer)
                if isinstance(action, Send | Receive) and action.group == tokens
                else action
                for action in each
            ]
            for each in ranks
        ]

    layout = Layout(2, stagger, combined=True)
    assert Machine(merged(programs(layout, rules=EARLY)), lazy=False).play()
    assert not Machine(programs(layout, rules=EARLY), lazy=False).play()
