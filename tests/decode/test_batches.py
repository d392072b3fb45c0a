"""What a request gets does not depend on its neighbours, its slot, its moment or the grid."""

import math
from dataclasses import replace

import pytest
import torch

from stagdist.decode.request import FinishReason, Request, RequestOutput
from stagdist.decode.topology import HeadLayout
from tests.decode.batches import REQUESTS, VARIANTS, arrangement, by_name
from tests.decode.comparison import CLEAR_MARGIN, best_token, reference_logits
from tests.decode.decoding import CONTEXT, Case, Ran, run_cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

OnRanks = tuple[int, int, HeadLayout]
SINGLE = ("plain", "shared, stagger 2, window, combined")
"""Variants that are decoded in fp32 too."""
USUAL: dict[OnRanks, tuple[str, ...]] = {
    (2, 1, "last"): tuple(VARIANTS),
    (2, 1, "sharded"): ("combined", "sequential", *SINGLE),
    (1, 2, "last"): ("sequential", *SINGLE),
    (2, 2, "last"): SINGLE,  # test_exactness.py decodes with a sharded head on this grid
}
"""Variants of each grid that `make test` runs: two stages run all of them."""
Alone = dict[str, dict[str, RequestOutput]]
"""By variant and request."""


@pytest.fixture(scope="module")
def alone() -> Alone:
    """Every request in an engine of its own: nothing was there before it or beside it."""
    result = {}
    for variant in VARIANTS:
        cases = [arrangement(variant, [request], 1) for request in REQUESTS]
        result[variant] = {
            case.requests[0].request_id: ran.completions[0] for case, ran in zip(cases, run_cases(cases), strict=True)
        }
    return result


def grid_cases(grid: OnRanks, *, usual: bool) -> list[Case]:
    """The usual variants, or the others, in fp64; on the 2x2 grid two also in fp32, whose margins are clear."""
    _, tensor, head = grid
    chosen = [variant for variant in VARIANTS if (variant in USUAL[grid]) == usual]
    single = SINGLE if usual and grid == (2, 2, "last") else ()
    return [
        arrangement(variant, REQUESTS, 3, tensor=tensor, head=head, precision=precision)
        for precision, variants in (("fp64", chosen), ("fp32", single))
        for variant in variants
    ]


class Runs:
    """The batches of every grid; one launch for each number of ranks, by the first test that asks."""

    def __init__(self) -> None:
        self._ran: dict[tuple[int, bool], dict[OnRanks, list[tuple[Case, Ran]]]] = {}

    def of(self, grid: OnRanks, variant: str) -> list[tuple[Case, Ran]]:
        """The cases of a variant, and what rank 0 did in each."""
        key = world, usual = grid[0] * grid[1], variant in USUAL[grid]
        if key not in self._ran:
            cases_of = {each: grid_cases(each, usual=usual) for each in USUAL if each[0] * each[1] == world}
            cases = [case for cases in cases_of.values() for case in cases]
            done = iter(run_ranks("tests.decode.decoding:run_cases", world, cases)[0])
            self._ran[key] = {each: [(case, next(done)) for case in cases] for each, cases in cases_of.items()}
        return [(case, done) for case, done in self._ran[key][grid] if case.name == variant]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


def same(completions: dict[str, RequestOutput], expected: dict[str, RequestOutput], tolerance: float = 1e-9) -> None:
    """Tokens and endings are equal, log-probabilities nearly."""
    assert completions.keys() == expected.keys()
    for name, done in completions.items():
        other = expected[name]
        assert (done.token_ids, done.finish_reason) == (other.token_ids, other.finish_reason), name
        assert [entry.token_id for entry in done.logprobs] == [entry.token_id for entry in other.logprobs], name
        for entry, like in zip(done.logprobs, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(like.logprob, abs=tolerance)
            assert [token for token, _ in entry.top] == [token for token, _ in like.top]


# --- a request alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_that_the_reference_and_the_noise_of_their_positions_give(alone: Alone, variant: str) -> None:
    for name in ("greedy", "sampled", "one token", "stops", "penalty", "whole context", "sampled, stops", "changed"):
        case = arrangement(variant, [request for request in REQUESTS if request.request_id == name], 1)
        request, done = case.requests[0], alone[variant][name]
        logits = reference_logits(case, request, done)
        ids, first = [*request.prompt_ids, *done.token_ids], len(request.prompt_ids)
        expected = [best_token(row, request, place, ids[:place]) for place, row in enumerate(logits, start=first)]
        assert list(done.token_ids) == expected, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_are_those_of_the_model_itself(alone: Alone, variant: str) -> None:
    for request in REQUESTS:
        done, count = alone[variant][request.request_id], request.params.logprobs
        if count is None:
            assert done.logprobs == ()
            continue
        logits = reference_logits(arrangement(variant, [request], 1), request, done)
        expected = torch.log_softmax(logits, -1)
        assert [entry.token_id for entry in done.logprobs] == list(done.token_ids)
        for row, entry in zip(expected, done.logprobs, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-9)
            best = row.topk(count)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_requests_end_where_they_should(alone: Alone, variant: str) -> None:
    for request in REQUESTS:
        done = alone[variant][request.request_id]
        room = min(request.params.max_new_tokens, CONTEXT - len(request.prompt_ids) + 1)
        stops = [token in request.params.stop_token_ids for token in done.token_ids]
        assert not any(stops[:-1]), "it went on after a stop id"
        assert done.finish_reason is (FinishReason.STOP if stops[-1] else FinishReason.LENGTH)
        assert len(done.token_ids) == room or (stops[-1] and len(done.token_ids) < room)
        assert done.time_to_first_token_s is not None and done.time_to_first_token_s > 0


def test_the_requests_are_of_all_kinds(alone: Alone) -> None:
    """Otherwise these tests would say little."""
    for completions in alone.values():
        endings = [done.finish_reason for done in completions.values()]
        assert {FinishReason.STOP, FinishReason.LENGTH} == set(endings)
        assert len({len(done.token_ids) for done in completions.values()}) > 4
    drawn = {variant: completions["sampled"].token_ids for variant, completions in alone.items()}
    assert len(set(drawn.values())) > 4, "all variants say the same"


def test_a_seed_changes_samples_and_only_them() -> None:
    seeded = [arrangement("plain", _with_seed(seed), 3) for seed in (1, 2)]
    first, second = (by_name(case, ran.completions) for case, ran in zip(seeded, run_cases(seeded), strict=True))
    for request in REQUESTS:
        name = request.request_id
        greedy = request.params.temperature == 0
        assert (first[name].token_ids == second[name].token_ids) == greedy


def _with_seed(seed: int) -> list[Request]:
    return [replace(request, params=replace(request.params, seed=seed)) for request in REQUESTS]


# --- in company -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_slots", [1, 3, 15, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, len(REQUESTS)))]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_that_come_and_go_change_nothing(alone: Alone, variant: str, num_slots: int) -> None:
    """In several orders where the order decides who meets whom; 15 slots hold all requests from the first step on."""
    orders = [REQUESTS[3:] + REQUESTS[:3], REQUESTS, REQUESTS[::-1]][: 1 if num_slots in (1, 15) else 3]
    cases = [arrangement(variant, order, num_slots) for order in orders]
    for case, ran in zip(cases, run_cases(cases), strict=True):
        same(by_name(case, ran.completions), alone[variant])


@pytest.mark.parametrize(
    ("grid", "variant"),
    [
        pytest.param(grid, variant, id=f"{grid}-{variant}", marks=[pytest.mark.slow] * (variant not in usual))
        for grid, usual in USUAL.items()
        for variant in VARIANTS
    ],
)
def test_every_grid_gives_the_same_tokens(alone: Alone, runs: Runs, grid: OnRanks, variant: str) -> None:
    for case, done in runs.of(grid, variant):
        single = case.options.precision == "fp32"
        if single:
            assert CLEAR_MARGIN < done.smallest_margin < math.inf, "choose other seeds: the margin rule says nothing"
        same(by_name(case, done.completions), alone[variant], tolerance=1e-4 if single else 1e-9)


@pytest.mark.parametrize("variant", SINGLE)
def test_single_precision_gives_the_same_tokens_in_a_batch(alone: Alone, variant: str) -> None:
    case = arrangement(variant, REQUESTS, 4, precision="fp32")
    (ran,) = run_cases([case])
    assert CLEAR_MARGIN < ran.smallest_margin < math.inf
    same(by_name(case, ran.completions), alone[variant], tolerance=1e-4)


def test_a_batch_takes_fewer_steps_than_its_requests_one_by_one() -> None:
    cases = [arrangement("plain", REQUESTS, num_slots) for num_slots in (1, 3, 10)]
    one, three, ten = (ran.steps for ran in run_cases(cases))
    longest = max(len(done.token_ids) for done in run_cases(cases[:1])[0].completions)
    assert one > 2 * three > 2 * ten >= 2 * (longest - 1)
