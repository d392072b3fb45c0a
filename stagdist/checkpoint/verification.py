"""Whether two directories hold the same model: by logits on real text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.proof import TEXT, plain_logits, shown_reader, text_ids
from stagdist.checkpoint.sources import ChangedTokenizerError, WeightSource, open_weights, source_tokenizer
from stagdist.checkpoint.training_source import Track, untracked
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError


@dataclass(frozen=True)
class Verdict:
    """How two models compare on a text.

    Attributes:
        tokens: tokens of the text that were used.
        largest_difference: of any logit.
        largest_logit: of the first model, by size, for comparison.
        equal_choices: share of positions where both rank the same token first.
    """

    tokens: int
    largest_difference: float
    largest_logit: float
    equal_choices: float


def verify(
    first: str | Path,
    second: str | Path,
    *,
    text: str = TEXT,
    tokenizer: str | None = None,
    trust_pickle: bool = False,
    track: Track[Any] = untracked,
) -> Verdict:
    """Run both on the same tokens, in fp32.

    Args:
        text: what to read; its beginning is used.
        tokenizer: where the tokenizer is; None for that of the first, else of the second.
        track: shows progress, by parameters that were read.

    Raises:
        CheckpointError: one cannot be read, or the vocabularies differ.
    """
    one, other = (open_weights(path, trust_pickle=trust_pickle) for path in (first, second))
    if one.model.vocab_size != other.model.vocab_size:
        raise CheckpointError(
            f"{one.directory} has {one.model.vocab_size} tokens, {other.directory} {other.model.vocab_size}; their "
            "logits cannot be compared"
        )
    shorter = min((one.model, other.model), key=lambda model: model.max_position_embeddings)
    input_ids = text_ids(_tokenizer(one, other, tokenizer), shorter, text)
    left, right = (_logits(source, input_ids, track) for source in (one, other))
    return Verdict(
        tokens=input_ids.shape[1],
        largest_difference=float((left - right).abs().max()),
        largest_logit=float(left.abs().max()),
        equal_choices=float((left.argmax(-1) == right.argmax(-1)).float().mean()),
    )


def _logits(source: WeightSource, input_ids: Tensor, track: Track[Any]) -> Tensor:
    with torch.no_grad(), shown_reader(source, track) as read:
        return plain_logits(source.model, read, input_ids)


def _tokenizer(one: WeightSource, other: WeightSource, given: str | None) -> Tokenizer:
    """As given, else that of the first that has one."""
    try:
        return source_tokenizer(one, given)
    except ChangedTokenizerError:
        raise
    except CheckpointError:
        if given is not None:
            raise
        return source_tokenizer(other, None)
