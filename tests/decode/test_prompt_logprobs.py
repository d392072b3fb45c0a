"""Log-probabilities of a prompt's own tokens are those of the reference, on every grid and beside other requests."""

from dataclasses import replace

import pytest
import torch

from stagdist.decode.request import FinishReason, Request, SamplingParams
from stagdist.decode.runtime import readout
from stagdist.decode.topology import HeadLayout
from tests.decode.batches import REQUESTS, VARIANTS, arrangement
from tests.decode.comparison import reference_logits
from tests.decode.decoding import Case, prompt, run_cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

OnRanks = tuple[int, int, HeadLayout]
ON_RANKS = ("plain", "combined", "sequential")
OTHERS = tuple(variant for variant in VARIANTS if variant not in ON_RANKS)
RUNS: list[tuple[OnRanks, tuple[str, ...], bool]] = [
    ((1, 1, "last"), tuple(VARIANTS), False),
    ((2, 1, "last"), ON_RANKS, False),
    ((2, 1, "last"), OTHERS, True),
    ((2, 1, "sharded"), tuple(VARIANTS), True),
    ((2, 2, "sharded"), ON_RANKS[:2], False),
    ((2, 2, "sharded"), (*ON_RANKS[2:], *OTHERS), True),
]
"""Grid, variants, and whether `make test-all` alone runs them."""


def asked(length: int, count: int, new_tokens: int) -> Request:
    """A request for scores. Of prompts with 11 tokens the last chunk is one position, which has no next token."""
    return Request(
        f"{length} {count}",
        prompt(length),
        SamplingParams(max_new_tokens=new_tokens, temperature=0.0, prompt_logprobs=count, logprobs=1),
    )


SCORED = [asked(11, 2, 3), asked(1, 1, 2), asked(13, 0, 0), asked(2, 5, 1)]


def cases_of(variants: tuple[str, ...], tensor: int, head: HeadLayout) -> list[Case]:
    """Requests with and without scores take turns."""
    mixed = [each for pair in zip(SCORED, REQUESTS, strict=False) for each in pair]
    return [arrangement(variant, mixed, 2, tensor=tensor, head=head) for variant in variants]


@pytest.mark.parametrize(
    ("grid", "variants"),
    [
        pytest.param(grid, variants, id=f"{grid}-{len(variants)}", marks=[pytest.mark.slow] * slow)
        for grid, variants, slow in RUNS
    ],
)
def test_scores_are_those_of_the_reference(
    grid: OnRanks, variants: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "SCORED_LOGITS", 100)  # in this process: blocks of two positions
    pipe, tensor, head = grid
    cases = cases_of(variants, tensor, head)
    target = "tests.decode.decoding:run_cases"
    ran = run_cases(cases) if pipe * tensor == 1 else run_ranks(target, pipe * tensor, cases)[0]
    for case, each in zip(cases, ran, strict=True):
        for request, done in zip(case.requests, each.completions, strict=True):
            count = request.params.prompt_logprobs
            if count is None:
                assert done.prompt_logprobs is None
                continue
            ids = request.prompt_ids
            assert done.finish_reason is FinishReason.LENGTH and len(done.token_ids) == request.params.max_new_tokens
            assert done.prompt_logprobs is not None and len(done.prompt_logprobs) == len(ids)
            whole = replace(request, prompt_ids=ids[:1])
            rows = reference_logits(case, whole, replace(done, token_ids=ids[1:])).log_softmax(-1)
            assert done.prompt_logprobs[0] is None
            for row, token, entry in zip(rows, ids[1:], done.prompt_logprobs[1:], strict=True):
                assert entry is not None and entry.token_id == token
                assert entry.logprob == pytest.approx(float(row[token]), abs=1e-9), case.name
                best = row.topk(count)
                assert [other for other, _ in entry.top] == best.indices.tolist()
                expected = torch.tensor([value for _, value in entry.top], dtype=torch.float64)
                assert torch.allclose(expected, best.values, rtol=0, atol=1e-9)
