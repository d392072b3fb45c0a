"""The sampler: the same tokens as a plain implementation, however the vocabulary and the batch are cut."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.noise import gumbel
from stagdist.decode.sampling.sampler import Sampler
from tests.decode.plain_sampler import (
    CPU,
    CUTS,
    PARAMS,
    VOCAB,
    check_logprobs,
    make_logits,
    plain_choice,
    samplers,
    step,
)


@pytest.mark.parametrize(
    ("cut", "together", "ties"),
    [
        pytest.param(
            CUTS[cut], together, ties, marks=[pytest.mark.slow] * slow,
            id=f"{'one batch' if together else 'one by one'}-{cut}-{'ties' if ties else 'distinct'}",
        )
        for cut in CUTS
        for together, ties, slow in [(True, False, False), (True, True, False), (False, True, cut != "two"),
                                     (False, False, True)]
    ],
)  # fmt: skip
def test_tokens_and_logprobs_are_those_of_a_plain_implementation(
    cut: list[tuple[int, int]], together: bool, ties: bool
) -> None:
    steps, names = 12, list(PARAMS)
    logits = make_logits(steps, len(names), ties=ties)
    prompts = [[slot, 3, 3, 30, *range(slot)] for slot in range(len(names))]
    ranks = samplers(cut)
    for slot, name in enumerate(names):
        for rank in ranks:
            rank.admit(slot, PARAMS[name], prompts[slot])
    generated: list[list[int]] = [[] for _ in names]
    groups = [list(range(len(names)))] if together else [[slot] for slot in range(len(names))]
    for number in range(steps):
        for group in groups:
            choice = step(ranks, cut, logits[number, group], group, [len(prompts[slot]) + number for slot in group])
            for row, slot in enumerate(group):
                params, row_logits = PARAMS[names[slot]], logits[number, slot].numpy()
                place = len(prompts[slot]) + number
                token, expected = plain_choice(row_logits, params, prompts[slot], generated[slot], place)
                assert choice.tokens[row] == token, names[slot]
                generated[slot].append(token)
                if params.logprobs is not None:
                    assert choice.logprobs is not None
                    check_logprobs(choice.logprobs[row].tolist(), params, token, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["greedy", "sampled", "top_k", "logprobs"])
def test_logits_may_be_of_any_floating_type(dtype: torch.dtype, name: str) -> None:
    logits = make_logits(1, 1)[0].to(dtype)
    ranks = samplers(CUTS["two"])
    for rank in ranks:
        rank.admit(4, PARAMS[name], [1])
    token, _ = plain_choice(logits[0].double().numpy(), PARAMS[name], [], [], 9)
    assert step(ranks, CUTS["two"], logits, [4], [9]).tokens.tolist() == [token]


def test_equal_logits_give_the_lowest_id_on_every_path() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, [11, 25, 36]] = 2.0
    for name in ("greedy", "penalty", "logprobs", "top_1"):
        ranks = samplers(CUTS["three"])
        for rank in ranks:
            rank.admit(0, PARAMS[name], [0])
        assert step(ranks, CUTS["three"], logits, [0, 1, 2], [0, 0, 0]).tokens.tolist() == [11, 11, 11]


def test_a_vocabulary_smaller_than_the_logprobs_asked_for_is_filled_up() -> None:
    cut = [(0, 3), (3, 2)]
    ranks = samplers(cut, vocab=5)
    for rank in ranks:
        rank.admit(0, SamplingParams(temperature=0, logprobs=7), [0])
    choice = step(ranks, cut, torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0]]), [0], [1])
    assert choice.logprobs is not None
    assert choice.logprobs[0, 1:8].tolist() == [3, 1, 2, 0, 4, -1, -1]
    assert choice.logprobs[0, 8:13].exp().sum().item() == pytest.approx(1)
    assert choice.logprobs[0, 13:].tolist() == [float("-inf")] * 2


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(top_k=6)])
def test_frequencies_are_the_softmax(params: SamplingParams) -> None:
    draws, cut = 20_000, CUTS["two"]
    logits = make_logits(1, 1)[0]
    ranks = samplers(cut, slots=1)
    for rank in ranks:
        rank.admit(0, replace(params, seed=77), [0])
    tokens = torch.cat(
        [
            step(ranks, cut, logits.expand(1000, -1), [0] * 1000, range(start, start + 1000)).tokens
            for start in range(0, draws, 1000)
        ]
    )
    scores = logits[0].double() / params.temperature
    if params.top_k:
        scores[scores < scores.topk(params.top_k).values[-1]] = float("-inf")
    expected = scores.softmax(0) * draws
    counts = torch.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    used = expected >= 5
    chi_square = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    degrees = int(used.sum()) - 1
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_a_request_gets_the_same_tokens_in_any_slot_beside_any_neighbours() -> None:
    cut, logits = CUTS["three"], make_logits(6, 1)

    def run(slot: int, neighbours: dict[int, str]) -> list[int]:
        ranks, tokens = samplers(cut), []
        for rank in ranks:
            rank.admit(slot, PARAMS["all"], [5, 6])
            for other, name in neighbours.items():
                rank.admit(other, PARAMS[name], [7])
        for number in range(6):
            slots = sorted([slot, *neighbours])
            batch = make_logits(number + 50, len(slots))[0]
            batch[slots.index(slot)] = logits[number, 0]
            choice = step(ranks, cut, batch, slots, [number + 40] * len(slots))
            tokens.append(int(choice.tokens[slots.index(slot)]))
            if number == 2 and neighbours:  # one leaves in the middle
                gone = min(neighbours)
                neighbours = {other: name for other, name in neighbours.items() if other != gone}
                for rank in ranks:
                    rank.retire(gone)
        return tokens

    alone = run(0, {})
    assert len(set(alone)) > 1
    assert run(9, {}) == alone
    assert run(2, {0: "greedy", 1: "top_p", 5: "penalty"}) == alone
    assert run(2, {7: "sampled", 3: "sampled logprobs"}) == alone


def test_another_seed_or_position_gives_other_tokens() -> None:
    cut, logits = CUTS["one"], torch.zeros(20, VOCAB)
    (rank,) = samplers(cut)
    rank.admit(0, SamplingParams(seed=1), [0])
    rank.admit(1, SamplingParams(seed=2), [0])
    first = step([rank], cut, logits, [0] * 20, range(20)).tokens
    again = step([rank], cut, logits, [0] * 20, range(20)).tokens
    other = step([rank], cut, logits, [1] * 20, range(20)).tokens
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) > 5


def width(rank: Sampler, slots: list[int]) -> int:
    """Columns of the message of the first rank of two."""
    return rank.candidates(torch.zeros(len(slots), 20), slots, torch.zeros(len(slots), dtype=torch.int64)).shape[1]


def test_slots_without_a_request_take_the_likeliest_token_on_the_shortest_message() -> None:
    ranks = samplers(CUTS["two"])
    logits = make_logits(1, 2)[0]
    assert width(ranks[0], [0, 5]) == 2
    assert torch.equal(step(ranks, CUTS["two"], logits, [0, 5], [3, 3]).tokens, logits.argmax(-1))
    for rank in ranks:
        rank.admit(5, PARAMS["top_p"], [1])
    assert width(ranks[0], [0, 1]) == 2
    assert step(ranks, CUTS["two"], logits, [0, 5], [3, 3]).tokens[0] == logits[0].argmax()
    for rank in ranks:
        rank.retire(5)
    assert width(ranks[0], [0, 5]) == 2


def test_messages_hold_what_their_parameters_need() -> None:
    (rank, _) = samplers(CUTS["two"])
    widths = {}
    for name, params in PARAMS.items():
        rank.admit(0, params, [1])
        widths[name] = width(rank, [0])
    assert (widths["greedy"], widths["sampled"], widths["penalty"], widths["top_1"]) == (2, 2, 2, 2)
    assert (widths["top_k"], widths["top_p"], widths["top_k of more than there is"]) == (10, 40, 40)
    assert (widths["logprobs"], widths["all"], widths["reward"]) == (3 + 1 + 10, 36 + 1 + 6, 4)


def test_a_new_request_does_not_see_the_tokens_of_the_last_one_in_its_slot() -> None:
    cut = CUTS["two"]
    ranks = samplers(cut)
    logits = torch.zeros(1, VOCAB)
    logits[0, 21], logits[0, 2] = 3.0, 2.0
    for prompt, expected in (([21], [2, 21]), ([0], [21, 2])):
        for rank in ranks:
            rank.admit(0, SamplingParams(temperature=0, repetition_penalty=2.0), prompt)
        assert [int(step(ranks, cut, logits, [0], [position]).tokens) for position in (1, 2)] == expected
        for rank in ranks:
            rank.retire(0)


DEFAULTS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": (),
    "allowed_token_ids": None,
    "min_tokens": 0,
}


@pytest.mark.parametrize("left_out", [None, *DEFAULTS])
def test_the_plain_implementation_tells_a_sampler_that_ignores_a_parameter(left_out: str | None) -> None:
    """The negative control of the comparisons above: with one parameter ignored, tokens differ."""
    cut, logits = CUTS["three"], make_logits(40, 1)
    params = replace(PARAMS["every change"], top_k=None, min_tokens=20)
    given = params if left_out is None else replace(params, **{left_out: DEFAULTS[left_out]})
    ranks, generated, equal = samplers(cut), list[int](), []
    for rank in ranks:
        rank.admit(0, given, [5, 33])
    for number in range(40):
        found = int(step(ranks, cut, logits[number], [0], [2 + number]).tokens)
        token, _ = plain_choice(logits[number, 0].numpy(), params, [5, 33], generated, 2 + number)
        equal.append(found == token)
        generated.append(found)
    assert all(equal) == (left_out is None)


@pytest.mark.parametrize("new", ["greedy", "every change", "penalty", "frequency", "bias", "allowed", "min tokens"])
@pytest.mark.parametrize("old", ["every change", "one allowed", "frequency that rewards", "min tokens, sampled"])
def test_a_slot_keeps_nothing_of_its_last_request(old: str, new: str) -> None:
    cut, logits = CUTS["two"], make_logits(8, 2)
    ranks, prompt, generated = samplers(cut), [7, 30, 30], list[int]()
    for rank in ranks:
        rank.admit(0, PARAMS[old], list(range(12)))
        rank.admit(1, PARAMS["every change"], [3])  # so that the plan applies everything to all rows
    for number in range(4):
        step(ranks, cut, logits[number], [0, 1], [12 + number, 1 + number])
    for rank in ranks:
        rank.retire(0)
        rank.admit(0, PARAMS[new], prompt)
    for number in range(8):
        choice = step(ranks, cut, logits[number], [0, 1], [3 + number, 5 + number])
        token, _ = plain_choice(logits[number, 0].numpy(), PARAMS[new], prompt, generated, 3 + number)
        assert int(choice.tokens[0]) == token
        generated.append(token)


@pytest.mark.parametrize("name", ["greedy", "sampled", "top_k", "top_p"])
@pytest.mark.parametrize("cut", [CUTS["one"], CUTS["three"]], ids=["one", "three"])
def test_margins_tell_how_close_the_second_best_was(cut: list[tuple[int, int]], name: str) -> None:
    params, logits = PARAMS[name], make_logits(1, 1)[0]
    ranks = samplers(cut, margins=True)
    for rank in ranks:
        rank.admit(0, params, [0])
    choice = step(ranks, cut, logits, [0], [4])
    scores = logits[0].double()
    if name != "greedy":
        noise = gumbel(torch.tensor([params.seed]), torch.tensor([4]), torch.arange(VOCAB))[0]
        ranked = scores.sort(descending=True)
        size = {"top_k": 5, "top_p": int((ranked.values.softmax(0).cumsum(0) < params.top_p).sum()) + 1}
        kept = ranked.indices[: size.get(name, VOCAB)]
        scores = torch.full_like(scores, float("-inf")).scatter(0, kept, (scores + noise)[kept])
    best = scores.topk(2)
    assert choice.margins is not None
    assert choice.tokens.tolist() == [best.indices[0].item()]
    assert choice.margins.tolist() == pytest.approx([(best.values[0] - best.values[1]).item()])


def test_a_vocabulary_of_one_token_has_no_second_best() -> None:
    cut = [(0, 1)]
    ranks = samplers(cut, vocab=1, margins=True)
    choice = step(ranks, cut, torch.tensor([[0.3]]), [0], [0])
    assert choice.margins is not None
    assert (choice.tokens.tolist(), choice.margins.tolist()) == ([0], [float("inf")])


@pytest.mark.parametrize("name", PARAMS)
def test_logits_that_are_not_numbers_still_give_a_token_of_the_vocabulary(name: str) -> None:
    for cut in (CUTS["one"], CUTS["three"]):
        for value in (float("nan"), float("-inf"), float("inf")):
            ranks = samplers(cut)
            for rank in ranks:
                rank.admit(0, PARAMS[name], [1])
            token = int(step(ranks, cut, torch.full((1, VOCAB), value), [0], [0]).tokens)
            assert 0 <= token < VOCAB


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARAMS)
def test_a_gpu_gives_the_same_tokens_and_is_never_waited_for(name: str) -> None:
    logits, gpu = make_logits(4, 1), Device("cuda", torch.float32)
    sampler = Sampler(num_slots=1, vocab_size=VOCAB, first_token=0, num_tokens=VOCAB, slice_size=VOCAB, device=gpu)
    sampler.admit(0, PARAMS[name], [3])
    generated, there = list[int](), logits.cuda()
    positions = 1 + torch.arange(4, device="cuda").unsqueeze(-1)
    sampler.candidates(there[0], [0], positions[0])  # uploads the parameters
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error")
        try:
            message = sampler.candidates(there[number], [0], positions[number])
            choice = sampler.choose(message.unsqueeze(0), [0], positions[number])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        token, _ = plain_choice(logits[number, 0].numpy(), PARAMS[name], [3], generated, 1 + number)
        generated.append(token)
        assert choice.tokens.tolist() == [token]


def test_the_likeliest_token_alone_is_what_a_message_would_choose() -> None:
    sampler = Sampler(num_slots=2, vocab_size=37, first_token=0, num_tokens=37, slice_size=37, device=CPU)
    sampler.admit(0, SamplingParams(temperature=0.0), [1])
    logits = torch.randn(2, 37, generator=torch.Generator().manual_seed(0))
    logits[1] = 0.0  # equal everywhere: the lowest id
    positions = torch.tensor([3, 4])
    whole = sampler.choose(sampler.candidates(logits, [0, 1], positions)[None], [0, 1], positions)
    alone = sampler.likeliest_alone(logits, [0, 1])
    assert alone is not None and alone.tokens.tolist() == whole.tokens.tolist() and alone.tokens[1] == 0
    sampler.admit(0, SamplingParams(temperature=1.0), [1])
    assert sampler.likeliest_alone(logits, [0, 1]) is None
    slice_of_two = Sampler(num_slots=1, vocab_size=37, first_token=0, num_tokens=19, slice_size=19, device=CPU)
    assert slice_of_two.likeliest_alone(logits[:1, :19], [0]) is None
