"""Tokens chosen inside a captured step are those of the steps that the host drives."""

import pytest
import torch

from stagdist.decode.sampling.sampling_plan import Mode
from tests.decode.captured_sampling import CAPTURED, captured_samplers, captured_step, needs
from tests.decode.plain_sampler import CUTS, make_logits, samplers, step


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
