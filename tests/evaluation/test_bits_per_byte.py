"""Every token but the first is scored exactly once, with the context of its window, whatever the batching."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from stagdist.errors import DataError
from stagdist.evaluation.bits_per_byte import nats_from_logits, score_text, text_windows
from stagdist.telemetry.score import TextScore

VOCABULARY = 11
TOKEN_BYTES = np.array([0, 1, 2, 3, 1, 1, 4, 1, 2, 1, 1], np.int32)


def _context_nats(inputs: Tensor, labels: Tensor) -> Tensor:
    """A causal loss that identifies the context of each label: it hashes the prefix of its row."""
    prefix = torch.cumsum(inputs * (torch.arange(inputs.shape[1]) + 3), dim=1)
    return ((prefix * 7 + labels * 13) % 101).double() / 10


def _slow_nats(ids: list[int], window: int, stride: int | None = None) -> float:
    """The definition, token by token."""
    total, stride = 0.0, stride or window
    for position in range(1, len(ids)):
        start = max(0, -(-(position - window) // stride)) * stride
        prefix = sum(token * (offset + 3) for offset, token in enumerate(ids[start:position]))
        total += (prefix * 7 + ids[position] * 13) % 101 / 10
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 25, 65, 66])
def test_the_score_equals_the_definition_token_by_token(length: int, batch_size: int) -> None:
    ids = np.random.default_rng(length).integers(1, VOCABULARY, length)
    score = score_text(_context_nats, ids, window=8, token_bytes=TOKEN_BYTES, batch_size=batch_size)
    assert score.tokens == length - 1
    assert score.bytes == sum(int(TOKEN_BYTES[token]) for token in ids[1:])
    assert score.nats == pytest.approx(_slow_nats(ids.tolist(), 8), rel=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 25, 66])
def test_overlapping_windows_and_parts_score_every_token_once(length: int, stride: int, parts: int) -> None:
    ids = np.random.default_rng(length).integers(1, VOCABULARY, length)
    total = TextScore(0, 0.0, 0)
    for part in range(parts):
        total += score_text(
            _context_nats, ids, window=8, stride=stride, token_bytes=TOKEN_BYTES, batch_size=3, part=(part, parts)
        )
    assert (total.tokens, total.bytes) == (length - 1, int(TOKEN_BYTES[ids[1:]].sum()))
    assert total.nats == pytest.approx(_slow_nats(ids.tolist(), 8, stride), rel=1e-12)


def test_a_window_scores_only_what_no_earlier_one_has() -> None:
    inputs, labels, scored = text_windows(np.arange(8), 4, 2, range(3))
    assert inputs.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 0]]
    assert labels.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]
    assert scored.tolist() == [[True] * 4, [False, False, True, True], [False, False, True, False]]


def test_windows_overlap_only_by_the_token_that_one_predicts_and_the_next_reads() -> None:
    inputs, labels, scored = text_windows(np.arange(7), 4, 4, range(2))
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]
    assert labels.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert scored.tolist() == [[True] * 4, [True, True, False, False]]


def test_calls_have_the_shapes_promised() -> None:
    shapes: list[tuple[int, ...]] = []

    def nats(inputs: Tensor, labels: Tensor) -> Tensor:
        assert inputs.shape == labels.shape and inputs.dtype == labels.dtype == torch.int64
        assert not torch.is_grad_enabled()
        shapes.append(tuple(inputs.shape))
        return torch.zeros(inputs.shape)

    for length in (20, 4):
        score_text(nats, [1] * length, window=4, token_bytes=TOKEN_BYTES, batch_size=3)
    assert shapes == [(3, 4), (2, 4), (1, 3)]


def test_the_loss_of_padding_never_counts() -> None:
    def nats(inputs: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels == 0, torch.inf, torch.ones(labels.shape))

    score = score_text(nats, [1] * 6, window=4, token_bytes=TOKEN_BYTES)
    assert score.nats == 5.0


def test_a_uniform_model_pays_the_logarithm_of_the_vocabulary() -> None:
    nats = nats_from_logits(lambda ids: torch.zeros(*ids.shape, VOCABULARY, dtype=torch.bfloat16))
    score = score_text(nats, list(range(11)), window=4, token_bytes=TOKEN_BYTES)
    assert score.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(10 * math.log2(VOCABULARY) / 17, rel=1e-6)


def test_logits_score_the_next_token_and_padded_vocabulary_is_harmless() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([table, torch.full((VOCABULARY, 5), -torch.inf, dtype=torch.float64)], dim=1)
    ids = torch.randint(VOCABULARY, (30,), generator=torch.Generator().manual_seed(1))
    expected = -sum(torch.log_softmax(table[a], 0)[b].item() for a, b in pairwise(ids))
    score = score_text(nats_from_logits(lambda x: padded[x]), ids.numpy(), window=7, token_bytes=TOKEN_BYTES)
    assert score.nats == pytest.approx(expected, rel=1e-12)


def test_scores_add_up() -> None:
    total = TextScore(10, 20.0, 30) + TextScore(1, 2.0, 3)
    assert total == TextScore(11, 22.0, 33)
    assert total.as_metrics() == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.exp(2)),
        "bits_per_byte": pytest.approx(22 / math.log(2) / 33),
        "scored_tokens": 11,
        "scored_bytes": 33,
    }


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow() -> None:
    assert TextScore(1, 1e6, 1).perplexity == math.inf


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "0 tokens"), ([1], "1 tokens"), ([1, 11], "vocabulary has 11"), ([1, -1], "tokens -1"), ([1, 0], "no bytes")],
)
def test_texts_that_cannot_be_scored_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_text(_context_nats, ids, window=4, token_bytes=TOKEN_BYTES)


def test_a_model_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1,\).*\(1, 3\)"):
        score_text(lambda x, y: torch.zeros(1), [1, 2, 3, 4], window=4, token_bytes=TOKEN_BYTES)
