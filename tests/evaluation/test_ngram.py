"""The bigram models are probability distributions and equal an implementation with dictionaries."""

import math
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from stagdist.errors import DataError
from stagdist.evaluation import ngram
from stagdist.evaluation.ngram import WittenBellBigram

VOCABULARY = 40


class SlowBigram:
    """The formulas with dictionaries, one token at a time."""

    def __init__(self, text: list[int], vocab_size: int) -> None:
        self.tokens = Counter(text)
        self.total = len(text)
        self.vocab_size = vocab_size
        self.followers: dict[int, Counter[int]] = defaultdict(Counter)
        for before, after in pairwise(text):
            self.followers[before][after] += 1

    def probability(self, before: int, after: int) -> float:
        types = len(self.tokens)
        unigram = (self.tokens[after] + types / self.vocab_size) / (self.total + types)
        seen = self.followers.get(before)
        if not seen:
            return unigram
        return (seen[after] + len(seen) * unigram) / (sum(seen.values()) + len(seen))


def _text(length: int, seed: int, highest: int = VOCABULARY) -> list[int]:
    """Skewed and with structure, so that counts differ widely; the upper part of the vocabulary stays rare."""
    random = np.random.default_rng(seed)
    steps = np.minimum(random.geometric(0.2, length), highest)
    return (np.cumsum(steps) % 17 * (random.random(length) < 0.9) + (random.integers(0, highest, length) // 2)).tolist()


@pytest.mark.parametrize("pairs_at_once", [7, 1 << 20])
def test_costs_equal_the_slow_implementation(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "PAIRS_AT_ONCE", pairs_at_once)
    train, text = _text(600, 0), np.random.default_rng(1).integers(0, VOCABULARY, 400).tolist()
    slow = SlowBigram(train, VOCABULARY)
    assert any(token not in slow.tokens for token in text) and any(token not in slow.followers for token in text)
    costs = WittenBellBigram(VOCABULARY).fit([train]).nats(text)
    expected = [-math.log(slow.probability(a, b)) for a, b in pairwise(text)]
    np.testing.assert_allclose(costs, expected, rtol=1e-12)


def test_pieces_are_read_as_one_text() -> None:
    text = _text(300, 2)
    pieces = [text[:1], [], text[1:120], text[120:]]
    whole, joined = (WittenBellBigram(VOCABULARY).fit(parts) for parts in ([text], pieces))
    np.testing.assert_array_equal(whole.nats(text), joined.nats(text))


def test_probabilities_sum_to_one_after_seen_unseen_and_last_tokens() -> None:
    text = [1, 2, 1, 3, 1, 2, 39]  # 39 is known but nothing ever followed it; 5 was never seen
    model = WittenBellBigram(VOCABULARY).fit([text])
    for context in (1, 2, 39, 5):
        probabilities = model.probabilities(context)
        assert probabilities.shape == (VOCABULARY,)
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
        assert probabilities.min() > 0
    np.testing.assert_array_equal(model.probabilities(39), model.probabilities(5))
    # after 1: 2 twice, 3 once, two kinds; the unigram of 2 is (2 + 4/40) / (7 + 4)
    assert model.probabilities(1)[2] == pytest.approx((2 + 2 * (2.1 / 11)) / (3 + 2))


def test_a_large_vocabulary_and_millions_of_tokens_need_little_memory() -> None:
    random = np.random.default_rng(0)
    vocab_size = 50_000
    text = (random.zipf(1.3, 1_000_000) % vocab_size).astype(np.int32)
    model = WittenBellBigram(vocab_size).fit([text])
    assert model.probabilities(int(text[0])).sum() == pytest.approx(1.0, abs=1e-9)
    assert np.isfinite(model.nats(text[:100_000])).all()
    stored = sum(array.nbytes for array in vars(model).values() if isinstance(array, np.ndarray))
    assert stored < 16 * len(text) + 32 * vocab_size


def test_bits_per_byte_leave_the_first_token_out() -> None:
    token_bytes = np.arange(VOCABULARY) % 4
    text = _text(200, 3)
    model = WittenBellBigram(VOCABULARY).fit([text])
    score = model.score(text, token_bytes)
    assert score.tokens == 199
    assert score.bytes == int(token_bytes[text[1:]].sum())
    assert model.bits_per_byte(text, token_bytes) == pytest.approx(model.nats(text).sum() / math.log(2) / score.bytes)


def test_real_text_costs_less_than_its_unigram_entropy() -> None:
    source = Path(ngram.__file__).read_bytes()
    train, held_out = source[: len(source) // 2], source[len(source) // 2 :]
    model = WittenBellBigram(256).fit([np.frombuffer(train, np.uint8)])
    bits = model.bits_per_byte(np.frombuffer(held_out, np.uint8), np.ones(256, np.int32))
    shares = np.bincount(np.frombuffer(held_out, np.uint8)) / len(held_out)
    entropy = -sum(share * math.log2(share) for share in shares if share)
    assert 2.0 < bits < entropy


def test_fitting_again_forgets_the_earlier_text() -> None:
    model = WittenBellBigram(VOCABULARY).fit([_text(300, 4)])
    again, fresh = model.fit([[1, 2, 1]]), WittenBellBigram(VOCABULARY).fit([[1, 2, 1]])
    np.testing.assert_array_equal(again.probabilities(1), fresh.probabilities(1))


def test_a_text_of_one_token_still_gives_a_distribution() -> None:
    assert WittenBellBigram(4).fit([[3]]).probabilities(0).sum() == pytest.approx(1.0)


def test_misuse_is_refused() -> None:
    with pytest.raises(DataError, match="empty text"):
        WittenBellBigram(4).fit([[], []])
    with pytest.raises(DataError, match="4..4"):
        WittenBellBigram(4).fit([[4]])
    with pytest.raises(ValueError, match="call fit first"):
        WittenBellBigram(4).nats([1, 2])
    with pytest.raises(DataError, match="at least two"):
        WittenBellBigram(4).fit([[1, 2]]).score([1], np.ones(4))
