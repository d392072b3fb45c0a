"""Decoding under NCCL's rules: no layout hangs, and what was done before would."""

import itertools
from collections.abc import Hashable, Sequence

import pytest
import torch.utils._python_dispatch as dispatch

from stagdist.decode import loading
from stagdist.decode.stage import Stage
from stagdist.decode.topology import HEAD_LAYOUTS
from tests.parallel.nccl_decoding import EARLY, Layout, recorded
from tests.parallel.nccl_rules import (
    COMPUTE,
    Collective,
    Machine,
    Program,
    QueueOf,
    Receive,
    Send,
    Stream,
)
from tests.parallel.recording import Recorder

STAGES = range(1, 9)


def layouts(stages: int) -> list[Layout]:
    """Everything that one number of stages can be asked for; a single one gets two tensor ranks, to have peers."""
    tensor = 2 if stages == 1 else 1
    staggered = [
        Layout(stages, stagger, head, combined, tensor)
        for stagger, head, combined in itertools.product((0, 1, 2), HEAD_LAYOUTS, (False, True))
    ]
    return [*staggered, *(Layout(stages, None, head, tensor=tensor) for head in HEAD_LAYOUTS)]


MORE = [
    *(Layout(2, 1, head, combined, tensor=2) for head in HEAD_LAYOUTS for combined in (False, True)),
    Layout(2, each=2),
    Layout(3, 2, traced=True),
    Layout(2, 1, "sharded", combined=True, traced=True),
]


def programs(layout: Layout, **options: object) -> list[Program]:
    """What the ranks of a layout enqueue."""
    return [recorder.program for recorder in recorded(layout, **options)]  # type: ignore[arg-type]


def round_robin(queues: int) -> QueueOf:
    """The hardware queue of each stream, in the order in which they are made."""
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


@pytest.mark.parametrize("stages", STAGES)
def test_no_layout_hangs(stages: int) -> None:
    for layout in [*layouts(stages), *(MORE if stages == 2 else [])]:
        ranks = programs(layout)
        assert not Machine(ranks).play(), f"{layout}: kernels that load at their first launch"
        assert not Machine(ranks, buffered=False, lazy=False).play(), f"{layout}: messages without room in buffers"
        assert not Machine(ranks, synchronize=True).play(), f"{layout}: a host that waits after every action"
        for queues in (8, 32):
            assert not Machine(ranks, lazy=False, queue_of=round_robin(queues)).play(), f"{layout}: {queues} queues"


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_any_two_streams_may_share_a_hardware_queue(stages: int) -> None:
    for layout in layouts(stages):
        ranks = programs(layout)
        for pair in itertools.combinations(streams(ranks), 2):
            assert not Machine(ranks, lazy=False, queue_of=together(*pair)).play(), f"{layout}: {pair} share a queue"


def test_the_dry_pass_has_loaded_every_kernel_before_the_first_hand_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real, loaded = loading.dry_pass, []

    def dry_pass(stage: Stage) -> None:
        real(stage)
        mode = dispatch._get_current_dispatch_mode()
        assert isinstance(mode, Recorder)
        loaded.append(set(mode.loaded))

    monkeypatch.setattr(loading, "dry_pass", dry_pass)
    for layout in (Layout(2, 2, "sharded"), Layout(3, 0, combined=True), Layout(2, None), Layout(2, tensor=2)):
        loaded.clear()
        recorders = recorded(layout, dry=True, by_shape=True)
        assert [recorder.loaded - before for recorder, before in zip(recorders, loaded, strict=True)] == [set()] * len(
            recorders
        ), f"{layout}: kernels that are launched for the first time later"
        assert not Machine([recorder.program for recorder in recorders], buffered=False).play(), layout


def test_without_the_dry_pass_a_message_without_room_in_buffers_hangs_a_sharded_head() -> None:
    assert Machine(programs(Layout(2, 1, "sharded"), by_shape=True), buffered=False).play()
    assert not Machine(programs(Layout(2, 1, "sharded"), by_shape=True, dry=True), buffered=False).play()


# --- what was done before hangs ---------------------------------------------------------------------------------


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
        sums = next(action.group for action in ranks[0] if isinstance(action, Collective))
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
