"""Tokens chosen inside a captured step are those of the steps that the host drives."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stagdist.decode.sampling.sampling_plan import Mode
from tests.decode.captured_sampling import CAPTURED, captured_samplers, captured_step, needs
from tests.decode.fake_cuda import FakeCuda, FakeGraph, _Recording
from tests.decode.plain_sampler import CUTS, PARAMS, make_logits, samplers, step


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_tokens_are_those_of_the_host_driven_path(cut: list[tuple[int, int]], ties: bool) -> None:
    host, ranks = samplers(cut), captured_samplers(cut)
    modes = ranks[0].modes()
    is_complete = max(size for _, size in cut) >= 37
    assert modes == (Mode.GREEDY, Mode.SAMPLED, Mode.TRUNCATED)[: 2 + is_complete]
    served = [name for name, params in CAPTURED.items() if needs(params, is_complete) is not Mode.OTHER]
    names = [None if number % 5 == 4 else name for number, name in enumerate(served)]
    for slot, name in enumerate(names):
        if name is not None:
            for rank in [*host, *ranks]:
                rank.admit(slot, CAPTURED[name], [slot, 3, 3, 30])
    logits = make_logits(10, len(names), ties=ties)
    slots = range(len(names))
    mode = ranks[0].mode(slots)
    assert mode is modes[-1]
    seen = []
    for number in range(10):
        positions = [4 + number if name else 0 for name in names]
        expected = step(host, cut, logits[number], slots, positions).tokens
        tokens = captured_step(ranks, cut, mode, logits[number], torch.tensor(positions))
        assert tokens.tolist() == expected.tolist()
        seen.append(tokens)
    assert len(torch.stack(seen).unique()) > 15


class _Operations(TorchDispatchMode):
    """Collects the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Mode.GREEDY, Mode.SAMPLED, Mode.TRUNCATED])
def test_a_repeated_step_chooses_for_the_requests_of_the_moment(mode: Mode) -> None:
    """What a capture takes from the host stays as it was: parameters, prompts and positions must not be among it."""
    cut, logits = CUTS["one"], make_logits(1, 5)[0]
    names = [name for name, params in CAPTURED.items() if mode in (needs(params), Mode.TRUNCATED)]
    (captured,), positions = captured_samplers(cut, slots=5), torch.zeros(5, dtype=torch.int64)
    graph = FakeGraph(FakeCuda())
    with _Recording(graph.operations):
        tokens = captured.choose_in_graph(mode, logits, positions, None)
    for first in range(len(names)):
        host = samplers(cut, slots=5)
        for rank in (captured, *host):
            for slot in range(5):
                rank.admit(slot, CAPTURED[names[(first + slot) % len(names)]], [slot, first, 30])
        captured.retire(4)
        host[0].retire(4)
        for number in range(3):
            logits.copy_(make_logits(first + 3, 5)[number])
            positions.copy_(torch.tensor([3 + number] * 4 + [-1]))
            graph.replay()
            expected = step(host, cut, logits, range(5), positions.tolist()).tokens
            assert tokens[:4].tolist() == expected[:4].tolist(), (names[first], number)


@pytest.mark.parametrize("mode", [Mode.GREEDY, Mode.SAMPLED, Mode.TRUNCATED])
def test_a_captured_step_takes_nothing_to_the_host(mode: Mode) -> None:
    (sampler,) = captured_samplers(CUTS["one"])
    with _Operations() as seen:
        sampler.choose_in_graph(mode, make_logits(1, 4)[0], torch.ones(4, dtype=torch.int64), None)
    assert seen.names and not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "item", "equal"}


def test_the_mode_is_that_of_the_most_demanding_row() -> None:
    complete, part = captured_samplers(CUTS["one"])[0], captured_samplers(CUTS["two"])[0]
    assert complete.mode(range(3)) is Mode.GREEDY
    for name, mode, mode_of_part in (
        ("top_1", Mode.GREEDY, Mode.GREEDY),
        ("penalty", Mode.SAMPLED, Mode.SAMPLED),
        ("top_p", Mode.TRUNCATED, Mode.OTHER),
        ("logprobs", Mode.OTHER, Mode.OTHER),
    ):
        for sampler, expected in ((complete, mode), (part, mode_of_part)):
            sampler.admit(2, PARAMS[name], [1])
            assert sampler.mode(range(3)) is expected
            assert sampler.mode([0, 1]) is Mode.GREEDY
    for sampler in (complete, part):
        sampler.retire(2)
        assert sampler.mode(range(3)) is Mode.GREEDY
    (margins,) = captured_samplers(CUTS["one"], want_margins=True)
    assert (margins.modes(), margins.mode([0])) == ((), Mode.OTHER)


def test_rows_without_a_request_leave_no_trace() -> None:
    (sampler,) = captured_samplers(CUTS["one"], slots=2)
    for slot in range(2):
        sampler.admit(slot, PARAMS["presence"], [1])
    for number in range(3):
        sampler.choose_in_graph(Mode.SAMPLED, make_logits(1, 2)[0], torch.tensor([1 + number, -number]), None)
    assert sampler._processor.tensors()["counts"].sum(1).tolist() == [3, 0]
