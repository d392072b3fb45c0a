"""Log-probabilities of the tokens of prompts, however the vocabulary is cut, and what a request makes of them."""

from typing import Any

import pytest
import torch

from stagdist.decode.request import FinishReason, Request, SamplingParams
from stagdist.decode.request_state import RequestState
from stagdist.decode.sampling.sampler import merge_prompt_scores
from tests.decode.plain_sampler import CUTS, VOCAB, make_logits, samplers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_scores_of_a_prompt_are_log_probabilities_of_its_tokens(
    cut: list[tuple[int, int]], count: int, dtype: torch.dtype
) -> None:
    logits = torch.cat([make_logits(1, VOCAB)[0], torch.zeros(1, VOCAB)]).to(dtype)
    targets = torch.tensor([*range(VOCAB), 30])
    padded = torch.nn.functional.pad(logits, (0, 100), value=50.0)  # padding that would show
    messages = [
        rank.prompt_scores(padded[:, first : first + size], targets, count)
        for rank, (first, size) in zip(samplers(cut), cut, strict=True)
    ]
    assert {tuple(message.shape) for message in messages} == {(VOCAB + 1, 2 + 2 * count)}
    found = merge_prompt_scores(torch.stack(messages), count)
    expected = logits.double().log_softmax(-1)
    assert found[:, 0].tolist() == pytest.approx(expected.gather(1, targets[:, None])[:, 0].tolist(), abs=1e-12)
    best, order = expected.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found[:, 1 : 1 + count].long(), order[:, :count])
    assert torch.allclose(found[:, 1 + count :], best[:, :count], rtol=0, atol=1e-12)


def test_scores_of_a_prompt_fill_up_a_small_vocabulary() -> None:
    cut = [(0, 3), (3, 2)]
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0]])
    messages = [
        rank.prompt_scores(logits[:, first : first + size], torch.tensor([4]), 7)
        for rank, (first, size) in zip(samplers(cut, vocab=5), cut, strict=True)
    ]
    (row,) = merge_prompt_scores(torch.stack(messages), 7).tolist()
    assert (row[1:8], row[13:]) == ([3, 1, 2, 0, 4, -1, -1], [float("-inf")] * 2)
    assert row[0] == row[12] == pytest.approx(float(logits.double().log_softmax(-1)[0, 4]))


def scored(blocks: list[int], **params: Any) -> RequestState:
    """A request of five tokens whose prompt is scored in blocks of rows; row r has the values r, r + 0.5, ...."""
    state = RequestState(Request("scored", (9, 8, 7, 6, 5), SamplingParams(prompt_logprobs=1, **params)), allowed=1)
    rows = iter([[-row, row + 10, row + 20, -row - 0.5, -row - 0.75] for row in range(1, 5)])
    for size in blocks:
        state.take_prompt_scores([next(rows) for _ in range(size)])
    return state


@pytest.mark.parametrize("blocks", [[4], [1, 2, 1], [3, 1]])
def test_a_request_gives_the_scores_of_its_prompt_once(blocks: list[int]) -> None:
    state = scored(blocks)
    first = state.output()
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    found = [(each.token_id, each.logprob, each.top) for each in first.prompt_logprobs if each]
    assert found == [(9 - row, -row, ((row + 10, -row - 0.5),)) for row in range(1, 5)]
    state.take_token(3, None, 1.0)
    assert state.output().prompt_logprobs is None


def test_a_prompt_that_is_only_scored_has_no_new_token() -> None:
    state = scored([2], max_new_tokens=0)
    assert state.output().prompt_logprobs is None, "two rows are missing"
    state = scored([4], max_new_tokens=0)
    state.take_token(3, None, 1.0)
    done = state.output()
    assert (done.token_ids, done.text, done.finish_reason) == ((), "", FinishReason.LENGTH)
    assert done.prompt_logprobs is not None and len(done.prompt_logprobs) == 5


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    state = RequestState(Request("one", (4,), SamplingParams(prompt_logprobs=0, max_new_tokens=0)), allowed=1)
    state.take_token(3, None, 1.0)
    assert state.output().prompt_logprobs == (None,)
