"""Bigram models with Witten-Bell smoothing: what a text costs without any neural network, the bar to be under.

    unigram   P(w)   = (c(w) + T / V) / (N + T)              N tokens, T of them distinct, V in the vocabulary
    bigram    P(w|h) = (c(h,w) + T(h) P(w)) / (c(h) + T(h))  T(h) distinct tokens seen after h

After a token that was never followed by anything the unigram speaks.

Source: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991; in the
interpolated form of Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from stagdist.errors import DataError
from stagdist.evaluation.bits_per_byte import scored_bytes
from stagdist.telemetry.score import TextScore

PAIRS_AT_ONCE = 1 << 22
"""Pairs sorted together while fitting, 32 MiB."""


class WittenBellBigram:
    """A bigram model over bytes or over the tokens of any tokenizer.

    Counts are sparse: memory grows with the distinct pairs, not with the square of the vocabulary.

    Args:
        vocab_size: tokens that get probability.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; it must be at least 1")
        self.vocab_size = vocab_size
        self._pair_codes = np.empty(0, np.int64)
        self._pair_counts = np.empty(0, np.int64)
        self._context_counts = np.zeros(vocab_size, np.int64)
        self._context_types = np.zeros(vocab_size, np.int64)
        self._unigram: np.ndarray | None = None

    def fit(self, sequences: Iterable[Sequence[int] | np.ndarray]) -> "WittenBellBigram":
        """Count a text given in pieces, read one after the other as if joined (documents are packed as in training).

        An earlier fit is forgotten.

        Raises:
            DataError: the text is empty or holds tokens outside the vocabulary.
        """
        token_counts = np.zeros(self.vocab_size, np.int64)
        codes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        last = np.empty(0, np.int64)
        for sequence in sequences:
            tokens = self._checked(sequence)
            token_counts += np.bincount(tokens, minlength=self.vocab_size)
            for start in range(0, len(tokens), PAIRS_AT_ONCE):
                piece = np.concatenate([last, tokens[start : start + PAIRS_AT_ONCE]])
                codes, counts = _merged(codes, counts, *np.unique(self._codes(piece), return_counts=True))
                last = piece[-1:]
        if token_counts.sum() == 0:
            raise DataError("a bigram model cannot be fitted on an empty text")
        contexts = codes // self.vocab_size
        self._pair_codes, self._pair_counts = codes, counts
        # float64 weights are exact up to 2**53 occurrences.
        self._context_counts = np.bincount(contexts, counts, self.vocab_size).astype(np.int64)
        self._context_types = np.bincount(contexts, minlength=self.vocab_size)
        types = np.count_nonzero(token_counts)
        self._unigram = (token_counts + types / self.vocab_size) / (token_counts.sum() + types)
        return self

    def nats(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Cost in nats of every token but the first, given the one before it.

        Shapes: [len(ids) - 1], float64.
        """
        tokens = self._checked(ids)
        return -np.log(self._pair_probabilities(tokens[:-1], tokens[1:]))

    def probabilities(self, context: int) -> np.ndarray:
        """Probability of every token after `context`.

        Shapes: [vocab_size], float64, sum 1.
        """
        everything = np.arange(self.vocab_size)
        return self._pair_probabilities(np.full(self.vocab_size, context), everything)

    def score(self, ids: Sequence[int] | np.ndarray, token_bytes: np.ndarray) -> TextScore:
        """Score a text like a model's: first token unscored, bytes of the scored tokens.

        Args:
            ids: tokens of the text.
            token_bytes: UTF-8 bytes of every token of the vocabulary, [vocab_size].

        Raises:
            DataError: as `bits_per_byte.score_text`.
        """
        tokens = self._checked(ids)
        text_bytes = scored_bytes(tokens, token_bytes)
        return TextScore(tokens=len(tokens) - 1, nats=float(self.nats(tokens).sum()), bytes=text_bytes)

    def bits_per_byte(self, ids: Sequence[int] | np.ndarray, token_bytes: np.ndarray) -> float:
        """Bits per UTF-8 byte of a text, see `score`."""
        return self.score(ids, token_bytes).bits_per_byte

    def _codes(self, tokens: np.ndarray) -> np.ndarray:
        return tokens[:-1] * self.vocab_size + tokens[1:]

    def _pair_probabilities(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        if self._unigram is None:
            raise ValueError("the bigram model was not fitted; call fit first")
        unigram = self._unigram[tokens]
        pairs = self._lookup(contexts * self.vocab_size + tokens)
        seen, types = self._context_counts[contexts], self._context_types[contexts]
        bigram = (pairs + types * unigram) / np.maximum(seen + types, 1)
        return np.where(seen > 0, bigram, unigram)

    def _lookup(self, codes: np.ndarray) -> np.ndarray:
        """Counts of pairs, 0 for those never seen."""
        if len(self._pair_codes) == 0:
            return np.zeros(len(codes), np.int64)
        places = np.minimum(np.searchsorted(self._pair_codes, codes), len(self._pair_codes) - 1)
        return np.where(self._pair_codes[places] == codes, self._pair_counts[places], 0)

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise DataError(
                f"the text holds tokens {tokens.min()}..{tokens.max()}, but the vocabulary has {self.vocab_size}"
            )
        return tokens


def _merged(
    codes: np.ndarray, counts: np.ndarray, more_codes: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of two tables of counts, each sorted by code."""
    if len(codes) == 0:
        return more_codes, more_counts
    union, places = np.unique(np.concatenate([codes, more_codes]), return_inverse=True)
    summed = np.bincount(places, np.concatenate([counts, more_counts]), len(union)).astype(np.int64)
    return union, summed
