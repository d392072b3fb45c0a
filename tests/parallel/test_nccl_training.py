"""Training under NCCL's rules: no layout hangs, and negative controls do."""

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest

from tests.parallel.nccl_rules import COMPUTE, Launch, Machine, Program, Receive, Send, Stream, StreamWait
from tests.parallel.nccl_training import Layout, programs
from tests.parallel.recording import EARLY
from tests.parallel.test_nccl_decoding import round_robin, slow_but, streams, together
from tests.ranks import run_ranks
from tests.training.parity_cases import Case


def micro_batches_of(pipe: int) -> list[int]:
    """Micro-batches of a step: few, around the number of stages, around the most in flight (2 * pipe - 1), and many."""
    chosen = {1, 2, 3, pipe - 1, pipe, pipe + 1, 2 * pipe - 2, 2 * pipe - 1, 2 * pipe, 16}
    return sorted(number for number in chosen if 1 <= number <= 16)


@pytest.mark.parametrize("pipe", slow_but(range(1, 9), 1, 2, 3, 4, 8))
def test_no_layout_hangs(pipe: int) -> None:
    for micro_batches in micro_batches_of(pipe):
        ranks = programs(Layout(pipe, micro_batches))
        assert not Machine(ranks).play(), f"{micro_batches} micro-batches: kernels that load at their first launch"
        assert not Machine(ranks, synchronize=True).play(), f"{micro_batches} micro-batches: a host that always waits"
        assert not Machine(ranks, buffered=False).play(), f"{micro_batches} micro-batches: no room in buffers"
        for queues in (8, 32):
            stuck = Machine(ranks, buffered=False, queue_of=round_robin(queues)).play()
            assert not stuck, f"{micro_batches} micro-batches: {queues} hardware queues"


@pytest.mark.parametrize(("pipe", "data", "tensor"), [(1, 2, 2), (2, 2, 1), (2, 1, 2), (2, 2, 2), (4, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_no_grid_hangs(pipe: int, data: int, tensor: int, micro_batches: int) -> None:
    ranks = programs(Layout(pipe, micro_batches, data, tensor))
    assert not Machine(ranks, synchronize=True).play()
    for buffered in (False, True):
        assert not Machine(ranks, buffered=buffered).play()
        assert not Machine(ranks, buffered=buffered, queue_of=round_robin(8)).play()


@pytest.mark.parametrize(("pipe", "micro_batches", "tensor"), [(2, 8, 2), (4, 8, 1)])
def test_which_streams_may_share_a_hardware_queue(pipe: int, micro_batches: int, tensor: int) -> None:
    """Without room in buffers the two edges between the same neighbors must not: hence 32 queues."""
    ranks = programs(Layout(pipe, micro_batches, tensor=tensor))
    hanging = set()
    for pair in itertools.combinations(streams(ranks), 2):
        queue_of = together(*pair)
        assert not Machine(ranks, queue_of=queue_of).play(), f"{pair} share a queue"
        if Machine(ranks, buffered=False, lazy=False, queue_of=queue_of).play():
            hanging.add(frozenset(pair))
    assert hanging == both_directions(ranks)


def both_directions(ranks: Sequence[Program]) -> set[frozenset[Stream]]:
    """For every two neighbors, the communicators of the two edges between them."""
    edges: dict[frozenset[int], set[Stream]] = {}
    for rank, each in enumerate(ranks):
        for action in each:
            if isinstance(action, Send):
                edges.setdefault(frozenset((rank, action.peer)), set()).add(action.group)
    return {frozenset(groups) for groups in edges.values()}


def test_one_hardware_queue_hangs() -> None:
    ranks = programs(Layout(2, 8))
    assert Machine(ranks, buffered=False, queue_of=lambda stream: 0).play(), "one queue works: allow it"


# --- negative controls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pipe", [2, 3, 4, 8])
def test_receives_posted_early_hang_when_kernels_are_loaded(pipe: int) -> None:
    stuck = Machine(programs(Layout(pipe, 8), rules=EARLY, dry=False)).play()
    assert len(stuck) == pipe and "its host at Launch" in stuck[0] and "Receive" in stuck[0]


@pytest.mark.parametrize(("pipe", "micro_batches"), [(2, 8), (4, 12)])
def test_receives_posted_early_hang_when_they_share_a_hardware_queue_with_compute(
    pipe: int, micro_batches: int
) -> None:
    ranks = programs(Layout(pipe, micro_batches), rules=EARLY)
    assert not Machine(ranks, lazy=False).play(), "with a queue for each stream"
    pairs = [(COMPUTE, group) for group in streams(ranks)[1:]]
    assert any(Machine(ranks, lazy=False, queue_of=together(*pair)).play() for pair in pairs)


# --- real ranks -------------------------------------------------------------------------------------------------

REAL = "tests.parallel.nccl_training:real_program"


def hand_offs(program: Program) -> list[tuple[str, int]]:
    """Messages in order: their kind and the peer."""
    return [(type(action).__name__, action.peer) for action in program if isinstance(action, Send | Receive)]


def waited_for_at_once(program: Program) -> list[bool]:
    """For every receive, whether only receives are enqueued before the compute stream waits for it."""
    pairs = itertools.pairwise(program)
    return [isinstance(after, Receive | StreamWait) for action, after in pairs if isinstance(action, Receive)]


@pytest.mark.ranks
@pytest.mark.parametrize("grid", [pytest.param((2, 1, 1), marks=pytest.mark.slow), (4, 1, 1), (2, 2, 2)])
def test_real_ranks_do_not_hang_and_post_as_the_stand_in_does(grid: tuple[int, int, int]) -> None:
    sections = {"section_layers": [1] * grid[0]}
    case = Case("real", sections, grid)
    ranks: list[Program] = run_ranks(REAL, case.world_size, case)
    for buffered in (False, True):
        assert not Machine(ranks, buffered=buffered).play()
        assert not Machine(ranks, buffered=buffered, lazy=False, queue_of=round_robin(32)).play()
    for program in ranks:
        assert Counter(map(type, program))[Launch] and all(waited_for_at_once(program))
    stand_in = programs(Layout(grid[0], 8 // (2 * grid[1]), grid[1], grid[2]))
    for real, ours in zip(ranks, stand_in, strict=True):
        # The first messages create connections; DeepSpeed adds its own there.
        first_uses = 2 * len({action.peer for action in ours if isinstance(action, Send | Receive)})
        expected = hand_offs(ours)[first_uses:]
        assert hand_offs(real)[-len(expected) :] == expected
