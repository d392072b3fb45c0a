"""A bigram model with Witten-Bell smoothing: the baseline that a neural model must beat on the same text.

    unigram   P(w)   = (c(w) + T / V) / (N + T)              N tokens, T of them distinct, V in the vocabulary
    bigram    P(w|h) = (c(h,w) + T(h) P(w)) / (c(h) + T(h))  T(h) distinct tokens seen after h

After a token that was never followed by another one, the unigram is used.

Source: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991; in the
interpolated form of Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998.
"""

from collections.abc import Sequence

import numpy as np

from stagdist.errors import DataError
from stagdist.evaluation.bits_per_byte import scored_bytes
from stagdist.telemetry.score import TextScore


class WittenBellBigram:
    """A bigram model of one text, over bytes or over the tokens of any tokenizer.

    Only the pairs that occur are stored, so memory grows with the text and not with the square of the vocabulary.

    Args:
        ids: tokens of the text.
        vocab_size: number of tokens that get a probability.

    Raises:
        DataError: the text is empty or contains tokens outside the vocabulary.
    """

    def __init__(self, ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        tokens = self._checked(ids)
        if len(tokens) == 0:
            raise DataError("a bigram model cannot be fitted on an empty text")
        counts = np.bincount(tokens, minlength=vocab_size)
        distinct = np.count_nonzero(counts)
        self._unigram = (counts + distinct / vocab_size) / (len(tokens) + distinct)
        self._pairs, self._pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        self._seen_after = np.bincount(tokens[:-1], minlength=vocab_size)
        self._distinct_after = np.bincount(self._pairs // vocab_size, minlength=vocab_size)

    def nats(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Loss in nats of every token but the first, given the token before it.

        Shapes: [len(ids) - 1], float64.
        """
        tokens = self._checked(ids)
        before, after = tokens[:-1], tokens[1:]
        pairs = before * self._vocab_size + after
        counts = np.zeros(len(pairs), np.int64)
        if len(self._pairs):
            places = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
            counts = np.where(self._pairs[places] == pairs, self._pair_counts[places], 0)
        unigram, seen, distinct = self._unigram[after], self._seen_after[before], self._distinct_after[before]
        bigram = (counts + distinct * unigram) / np.maximum(seen + distinct, 1)
        return -np.log(np.where(seen > 0, bigram, unigram))

    def score(self, ids: Sequence[int] | np.ndarray, token_bytes: np.ndarray) -> TextScore:
        """Score a text as a model is scored: every token but the first, with its bytes.

        Args:
            token_bytes: UTF-8 bytes of every token of the vocabulary, [vocab_size].

        Raises:
            DataError: as `bits_per_byte.score_text`.
        """
        tokens = self._checked(ids)
        text_bytes = scored_bytes(tokens, token_bytes)
        return TextScore(tokens=len(tokens) - 1, nats=float(self.nats(tokens).sum()), bytes=text_bytes)

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise DataError(
                f"the text contains tokens {tokens.min()}..{tokens.max()}, but the vocabulary has {self._vocab_size}"
            )
        return tokens
