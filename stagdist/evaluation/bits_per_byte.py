"""How well a model predicts a text: nats, perplexity and bits per byte, comparable between tokenizers.

Definition: the text is divided into windows of `window` = L tokens without overlap. The first token of the text is not
scored; every other token is scored exactly once, given the tokens before it in its window. Window `k` reads the tokens
`kL .. (k+1)L - 1` and predicts `kL + 1 .. (k+1)L`. Bits per byte are the nats, divided by ln 2 and by the UTF-8 bytes
of the scored tokens.

With a `stride` R below L, windows overlap: window `k` begins at `kR` and scores only tokens that no earlier window has
scored, so every token outside the first window has at least `L - R` tokens before it. That takes L / R times the work.
"""

from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.data.prepare.formats import open_input, recognize
from stagdist.errors import DataError
from stagdist.telemetry.score import TextScore

TokenNats = Callable[[Tensor, Tensor], Tensor]
"""Loss of every label: (input_ids [B, S], labels [B, S]) -> nats [B, S]."""

PAD_ID = 0
"""Padding of the last window. A causal model does not attend to it, and its loss is not counted."""


def read_text(path: str | Path) -> str:
    """The content of a text file, decompressed, without a byte order mark, with its line ends unchanged.

    Raises:
        DataError: it is missing, not text, or not UTF-8.
    """
    try:
        if (contents := recognize(str(path))[0]) in ("parquet", "arrow"):
            raise DataError(f"{path} is a table ({contents}); write its text to a .txt file")
        with open_input(str(path)) as stream:
            return stream.read().removeprefix(BOM_UTF8).decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it (iconv -t utf-8)") from error


def score_text(
    nats: TokenNats,
    ids: Sequence[int] | np.ndarray,
    *,
    window: int,
    token_bytes: np.ndarray,
    stride: int | None = None,
    batch_size: int = 8,
    part: tuple[int, int] = (0, 1),
) -> TextScore:
    """Score a text window by window.

    Args:
        nats: loss of every label in nats; called without gradients.
        ids: tokens of the text.
        window: tokens per window, `max_position_embeddings` of the model.
        token_bytes: UTF-8 bytes of every token of the vocabulary, [V]; 0 for special tokens.
        stride: tokens from the beginning of one window to that of the next; None for no overlap.
        batch_size: windows per call; the last call may have fewer.
        part: (i, n) scores every n-th window, starting at the i-th; the scores of all n parts add up to the total.

    Raises:
        DataError: the text has fewer than two tokens, tokens outside the vocabulary, or no bytes.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    scored_bytes(tokens, token_bytes)
    stride = window if stride is None else stride
    window = min(window, len(tokens) - 1)  # a text shorter than a window is not padded
    score = TextScore(0, 0.0, 0)
    chosen = range(part[0], count_windows(len(tokens), window, stride), part[1])
    for start in range(0, len(chosen), batch_size):
        inputs, labels, scored = text_windows(tokens, window, stride, chosen[start : start + batch_size])
        with torch.no_grad():
            losses = nats(torch.from_numpy(inputs), torch.from_numpy(labels))
        if tuple(losses.shape) != scored.shape:
            raise ValueError(f"nats returned shape {tuple(losses.shape)} for labels of shape {scored.shape}")
        # Select, do not multiply: the loss of padding can be infinite.
        batch_nats = float(losses.detach().to("cpu", torch.float64)[torch.from_numpy(scored)].sum())
        targets = labels[scored]
        score += TextScore(len(targets), batch_nats, int(token_bytes[targets].sum(dtype=np.int64)))
    return score


def count_windows(num_tokens: int, window: int, stride: int) -> int:
    """Number of windows of a text of `num_tokens` tokens."""
    return 1 + max(0, -(-(num_tokens - 1 - window) // stride))


def text_windows(
    tokens: np.ndarray, window: int, stride: int, chosen: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels, and which labels are scored, of the chosen windows of a text.

    Shapes: each [windows, window]; the last window is padded with `PAD_ID`, which is not scored.
    """
    rows = np.asarray(chosen)
    positions = rows[:, None] * stride + np.arange(window)
    inside = positions < len(tokens) - 1
    positions = np.where(inside, positions, 0)
    inputs, labels = (np.where(inside, tokens[positions + ahead], PAD_ID) for ahead in (0, 1))
    scored = inside & ((rows[:, None] == 0) | (np.arange(window) >= window - stride))
    return inputs, labels, scored


def scored_bytes(tokens: np.ndarray, token_bytes: np.ndarray) -> int:
    """UTF-8 bytes of all tokens but the first.

    Raises:
        DataError: fewer than two tokens, tokens outside the vocabulary, or no bytes.
    """
    if len(tokens) < 2:
        raise DataError(f"a text of {len(tokens)} tokens cannot be scored: the first is not scored, give at least two")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= len(token_bytes):
        raise DataError(
            f"the text contains tokens {low}..{high}, but the vocabulary has {len(token_bytes)}; "
            "it was made with another tokenizer"
        )
    total = int(token_bytes[tokens[1:]].sum(dtype=np.int64))
    if total == 0:
        raise DataError(f"the {len(tokens) - 1} scored tokens have no bytes: all are special tokens")
    return total


def nats_from_logits(logits: Callable[[Tensor], Tensor]) -> TokenNats:
    """The loss of every label, computed from a model that returns logits.

    Shapes: logits takes input_ids [B, S] and returns [B, S, V]; V may be padded beyond the vocabulary with minus
    infinity.
    """

    def nats(input_ids: Tensor, labels: Tensor) -> Tensor:
        scores = logits(input_ids)
        if scores.dtype != torch.float64:
            scores = scores.float()
        return F.cross_entropy(scores.transpose(1, 2), labels.to(scores.device), reduction="none")

    return nats
