"""The bigram model is a probability distribution and equals an implementation with dictionaries."""

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


def probabilities(model: WittenBellBigram, context: int, vocab_size: int = VOCABULARY) -> np.ndarray:
    """Probability of every token after `context`."""
    pairs = [token for after in range(vocab_size) for token in (context, after)]
    return np.exp(-model.nats(pairs)[::2])


def test_costs_equal_the_slow_implementation() -> None:
    train, text = _text(600, 0), np.random.default_rng(1).integers(0, VOCABULARY, 400).tolist()
    slow = SlowBigram(train, VOCABULARY)
    assert any(token not in slow.tokens for token in text) and any(token not in slow.followers for token in text)
    costs = WittenBellBigram(train, VOCABULARY).nats(text)
    expected = [-math.log(slow.probability(a, b)) for a, b in pairwise(text)]
    np.testing.assert_allclose(costs, expected, rtol=1e-12)


def test_probabilities_sum_to_one_after_seen_unseen_and_last_tokens() -> None:
    text = [1, 2, 1, 3, 1, 2, 39]  # 39 was seen but never followed by another token; 5 was never seen
    model = WittenBellBigram(text, VOCABULARY)
    for context in (1, 2, 39, 5):
        assert probabilities(model, context).sum() == pytest.approx(1.0, abs=1e-12)
        assert probabilities(model, context).min() > 0
    np.testing.assert_array_equal(probabilities(model, 39), probabilities(model, 5))
    # after 1: 2 twice, 3 once, two distinct tokens; the unigram of 2 is (2 + 4/40) / (7 + 4)
    assert probabilities(model, 1)[2] == pytest.approx((2 + 2 * (2.1 / 11)) / (3 + 2))


def test_a_large_vocabulary_and_millions_of_tokens_need_little_memory() -> None:
    random = np.random.default_rng(0)
    vocab_size = 50_000
    text = (random.zipf(1.3, 1_000_000) % vocab_size).astype(np.int32)
    model = WittenBellBigram(text, vocab_size)
    assert probabilities(model, int(text[0]), vocab_size).sum() == pytest.approx(1.0, abs=1e-9)
    assert np.isfinite(model.nats(text[:100_000])).all()
    stored = sum(array.nbytes for array in vars(model).values() if isinstance(array, np.ndarray))
    assert stored < 16 * len(text) + 32 * vocab_size


def test_bits_per_byte_exclude_the_first_token() -> None:
    token_bytes = np.arange(VOCABULARY) % 4
    text = _text(200, 3)
    model = WittenBellBigram(text, VOCABULARY)
    score = model.score(text, token_bytes)
    assert score.tokens == 199
    assert score.bytes == int(token_bytes[text[1:]].sum())
    assert score.bits_per_byte == pytest.approx(model.nats(text).sum() / math.log(2) / score.bytes)


def test_real_text_costs_less_than_its_unigram_entropy() -> None:
    source = Path(ngram.__file__).read_bytes()
    train, held_out = source[: len(source) // 2], source[len(source) // 2 :]
    model = WittenBellBigram(np.frombuffer(train, np.uint8), 256)
    bits = model.score(np.frombuffer(held_out, np.uint8), np.ones(256, np.int32)).bits_per_byte
    shares = np.bincount(np.frombuffer(held_out, np.uint8)) / len(held_out)
    entropy = -sum(share * math.log2(share) for share in shares if share)
    assert 2.0 < bits < entropy


def test_a_text_of_one_token_still_gives_a_distribution() -> None:
    assert probabilities(WittenBellBigram([3], 4), 0, 4).sum() == pytest.approx(1.0)


def test_misuse_is_refused() -> None:
    with pytest.raises(DataError, match="empty text"):
        WittenBellBigram([], 4)
    with pytest.raises(DataError, match="4..4"):
        WittenBellBigram([4], 4)
    with pytest.raises(DataError, match="at least two"):
        WittenBellBigram([1, 2], 4).score([1], np.ones(4))
