"""Prompts that begin like what a slot holds get the tokens of prompts that are computed completely."""

from dataclasses import replace
from typing import Any

import pytest

from stagdist.decode.request import FinishReason, Request, RequestOutput, SamplingParams
from stagdist.decode.topology import HeadLayout
from tests.decode.batches import REQUESTS, arrangement
from tests.decode.decoding import CONTEXT, Case, Outbox, Ran, World, engine_of, prompt, run_cases
from tests.decode.test_exactness import COMBINATIONS
from tests.decode.test_serving import run_with
from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS

pytestmark = pytest.mark.ranks

MODELS = VARIANTS | COMBINATIONS
Models = frozenset[str]
OnRanks = tuple[int, int, HeadLayout]
ON_STAGES: Models = frozenset({"four sections", "stagger 0", "sequential", "combined", "shared, stagger 2, window"})
ON_SEVERAL_RANKS: Models = ON_STAGES | {"three sections with everything"} | COMBINATIONS.keys()
ON_TENSOR_RANKS: Models = frozenset({"sequential", "shared, stagger 2, window"})
"""Which positions are reused does not depend on tensor ranks, whose sums make a step ten times slower."""
ALL: Models = frozenset(MODELS)
RUNS: list[tuple[OnRanks, Models, bool]] = [
    ((1, 1, "last"), ON_SEVERAL_RANKS, False),
    ((1, 1, "last"), ALL - ON_SEVERAL_RANKS, True),  # test_conversations.py reuses positions of all models
    ((2, 1, "last"), ON_SEVERAL_RANKS, True),
    ((2, 1, "sharded"), ON_STAGES, False),
    ((2, 1, "sharded"), ON_SEVERAL_RANKS - ON_STAGES, True),
    ((1, 2, "last"), ON_TENSOR_RANKS, False),
    ((1, 2, "last"), frozenset({"three sections with everything", "combined"}), True),
    ((3, 1, "last"), ON_SEVERAL_RANKS, False),
    ((4, 1, "sharded"), ON_SEVERAL_RANKS, True),
]
"""Grid, models, and whether `make test-all` alone runs them."""
SLOTS = 1, 4
SYSTEM = prompt(11, seed=5)
"""The beginning of most prompts."""


def asked(name: str, ids: tuple[int, ...], count: int = 4, **params: Any) -> Request:
    """A greedy request with log-probabilities, which are compared too."""
    return Request(name, ids, SamplingParams(**{"max_new_tokens": count, "temperature": 0.0, "logprobs": 2} | params))


FIRST = asked("first", SYSTEM + (1, 2), 6)
SIMILAR = [
    FIRST,
    asked("again", FIRST.prompt_ids),
    asked("other end", SYSTEM + (3,), 3),
    asked("longer", FIRST.prompt_ids + (9, 9, 4), 5, temperature=0.9, seed=3),
    asked("unlike", prompt(7, seed=8)),
    asked("part", SYSTEM[:8], 7, repetition_penalty=1.3),
    asked("one in common", SYSTEM[:1] + (30, 31, 32)),
    asked("whole context", SYSTEM + prompt(CONTEXT - 11, seed=9), 1),
    asked("last", SYSTEM + (1, 2), 3),
]


def cases_of(grid: OnRanks, models: Models) -> list[Case]:
    """Every model that fits on a grid: without reuse, then with it. In one process also with one slot."""
    cases, (pipe, tensor, head) = [], grid
    for name in sorted(models):
        keys = MODELS[name]
        if len(keys.get("section_layers", [1, 1])) % pipe == 0:
            plain = arrangement("plain", SIMILAR, 1, tensor=tensor, head=head)
            plain = replace(plain, name=name, keys=keys, options=replace(plain.options, prefix_caching=False))
            cases.append(plain)
            for slots in SLOTS if pipe * tensor == 1 else SLOTS[-1:]:
                options = replace(plain.options, prefix_caching=True, num_slots=slots)
                cases.append(replace(plain, options=options))
    return cases


def same(found: list[RequestOutput], expected: list[RequestOutput], what: str) -> None:
    """Tokens are equal, log-probabilities nearly."""
    for done, other in zip(found, expected, strict=True):
        where = f"{what}: {done.request_id}, {done.cached_tokens} positions reused"
        assert (done.token_ids, done.finish_reason) == (other.token_ids, other.finish_reason), where
        for entry, like in zip(done.logprobs, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(like.logprob, abs=1e-9), where


@pytest.mark.parametrize(
    ("grid", "models"),
    [
        pytest.param(grid, models, id=f"{grid}-{len(models)}", marks=[pytest.mark.slow] * slow)
        for grid, models, slow in RUNS
    ],
)
def test_reused_positions_change_nothing(grid: OnRanks, models: Models) -> None:
    cases, size = cases_of(grid, models), grid[0] * grid[1]
    assert cases
    ran: list[Ran] = run_cases(cases) if size == 1 else run_ranks("tests.decode.decoding:run_cases", size, cases)[0]
    completions = [one.completions for one in ran]
    each = 1 + (len(SLOTS) if size == 1 else 1)
    for place in range(0, len(cases), each):
        expected, *others = completions[place : place + each]
        assert not any(done.cached_tokens for done in expected)
        for case, found in zip(cases[place + 1 : place + each], others, strict=True):
            same(found, expected, f"{case.name}, {case.options.num_slots} slots")
            by_name = {done.request_id: done.cached_tokens for done in found}
            if case.keys.get("cross_attention_window") is None:
                # The second one reuses all of the first but the lag; with a slot of its own, less than a chunk fewer.
                lag = case.keys.get("stagger", 1) if case.keys.get("connection") is None else 0
                most, spare = len(FIRST.prompt_ids) - max(1, lag), 0 if case.options.num_slots == 1 else 4
                assert most - spare <= by_name["again"] <= most
                assert sum(cached > 0 for cached in by_name.values()) >= 4


@pytest.mark.parametrize("window", [2, 4, 16])
@pytest.mark.parametrize("stagger", [0, 1, 2])
def test_a_next_turn_reuses_the_answer_of_the_one_before(window: int, stagger: int) -> None:
    keys = {"stagger": stagger, "cross_attention_window": window}
    case = replace(arrangement("plain", [FIRST], 2), keys=keys)
    (done,) = run_cases([case])[0].completions
    turn = asked("turn", FIRST.prompt_ids + done.token_ids + (5, 6), 3)
    both = replace(case, requests=[FIRST, turn], options=replace(case.options, num_slots=1))
    (alone,), (_, found) = (ran.completions for ran in run_cases([replace(case, requests=[turn]), both]))
    same([found], [alone], "next turn")
    held = len(FIRST.prompt_ids) + len(done.token_ids) - 1  # the last token was never fed back
    if window == 16 and stagger == 2:
        assert found.cached_tokens in (0, held - stagger)
    elif window < held and stagger == 2:
        assert found.cached_tokens == 0, "the ring buffer has lost what position `held - 2` sees"
    else:
        assert found.cached_tokens == held - stagger


@pytest.mark.parametrize("stages", [1, 2])
def test_copies_for_requests_of_one_prompt_wait_until_it_is_there(stages: int) -> None:
    same_prompt = [asked(str(seed), SYSTEM * 2, 3, temperature=1.0, seed=seed) for seed in range(4)]
    case = replace(arrangement("plain", same_prompt, 4), keys={"max_position_embeddings": CONTEXT + 8})
    alone = run_cases([replace(case, requests=[each]) for each in same_prompt])
    found = run_ranks("tests.decode.decoding:run_cases", stages, [case])[0][0] if stages > 1 else run_cases([case])[0]
    same(found.completions, [ran.completions[0] for ran in alone], "n requests")
    assert [done.cached_tokens for done in found.completions] == [0, 21, 21, 21]


def test_recurrent_decoding_reuses_prompts_and_no_answers() -> None:
    keys = {"section_layers": [2, 2], "share_section_weights": True, "cross_attention_window": 16}
    case = replace(arrangement("plain", [FIRST], 1), keys=keys)
    case = replace(case, options=replace(case.options, recurrent=True))
    (done,) = run_cases([case])[0].completions
    turn = asked("turn", FIRST.prompt_ids + done.token_ids + (5,), 3)
    cases = [replace(case, requests=each) for each in ([turn], [FIRST, turn, replace(turn, request_id="again")])]
    (alone,), (_, found, again) = (ran.completions for ran in run_cases(cases))
    same([found, again], [alone, alone], "recurrent")
    assert found.cached_tokens in (0, len(FIRST.prompt_ids) - 1)


def test_what_a_cancelled_prompt_left_is_reused() -> None:
    long = asked("long", SYSTEM * 2, 2)

    def act(engine: Any, output: RequestOutput) -> None:
        if output.request_id == "greedy":
            engine.cancel("long")

    completions = run_with([REQUESTS[0], long, asked("next", SYSTEM * 2, 2)], act)
    assert completions["long"].finish_reason is FinishReason.CANCELLED
    (alone,) = run_cases([arrangement("plain", [asked("next", SYSTEM * 2, 2)], 1)])[0].completions
    same([completions["next"]], [alone], "after a cancelled one")
    assert completions["next"].cached_tokens > 0


def test_prompts_whose_tokens_are_scored_reuse_nothing() -> None:
    scored = replace(FIRST, request_id="scored", params=replace(FIRST.params, prompt_logprobs=0))
    stage, transport = World().stage(arrangement("plain", [], 1))
    engine, outbox = engine_of(arrangement("plain", [], 1), stage, transport), Outbox()
    for each in (FIRST, scored, replace(FIRST, request_id="again")):
        engine.submit(each)
    engine.close()
    engine.run(outbox)
    assert [outbox.completions[name].cached_tokens for name in ("first", "scored", "again")] == [0, 0, 12]
    stats = engine.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (26, 12)
