"""Whether two directories hold the same model: by logits on real text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stagdist.checkpoint.convert.equivalence import unsettled_keys
from stagdist.checkpoint.convert.find import ChangedTokenizerError, WeightSource, open_weights, source_tokenizer
from stagdist.checkpoint.convert.proof import TEXT, source_logits, text_ids
from stagdist.checkpoint.training.content import Track, untracked
from stagdist.config.loading import differences
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Verdict:
    """How two models compare on a text.

    Attributes:
        tokens: tokens of the text that were used.
        largest_difference: of any logit.
        largest_logit: of the first model, by size, for comparison.
        equal_choices: share of positions where both rank the same token first.
        differing_keys: of the two models' configurations, with both values; most do not change the function.
        unsettled: of those that do, the ones that the text may not show; see `unsettled_keys`.
    """

    tokens: int
    largest_difference: float
    largest_logit: float
    equal_choices: float
    differing_keys: dict[str, tuple[Any, Any]]
    unsettled: dict[str, int | None]

    def same(self, tolerance: float) -> bool:
        """Whether the two are one function, as far as can be told."""
        return self.largest_difference <= tolerance and not self.unsettled

    def remarks(self) -> Iterator[str]:
        """The keys that differ, one line each, for a person."""
        for key, (left, right) in self.differing_keys.items():
            line = f"{key} is {left!r} in the first and {right!r} in the second"
            if key not in self.unsettled:
                yield line
            elif (needed := self.unsettled[key]) is None:
                yield f"{line}: another function, whatever the logits of one text"
            else:
                yield f"{line}: another function, which {self.tokens} tokens may not show; --tokens {needed} reads all"


def verify(
    first: str | Path,
    second: str | Path,
    *,
    text: str = TEXT,
    tokens: int | None = None,
    tokenizer: str | None = None,
    trust_pickle: bool = False,
    track: Track[Any] = untracked,
) -> Verdict:
    """Run both on the same tokens, in fp32, and compare what their configurations say.

    Args:
        text: what to read; its beginning is used.
        tokens: how many of its tokens, up to the context of both; None for `MAX_TOKENS` or what there is.
        tokenizer: where the tokenizer is; None for that of the first, else of the second.
        track: shows progress, by parameters that were read.

    Raises:
        CheckpointError: one cannot be read, or the vocabularies differ.
        ConfigError: there are not so many tokens in the text or in the context.
    """
    one, other = (open_weights(path, trust_pickle=trust_pickle) for path in (first, second))
    if one.model.vocab_size != other.model.vocab_size:
        raise CheckpointError(
            f"{one.directory} has {one.model.vocab_size} tokens, {other.directory} {other.model.vocab_size}; their "
            "logits cannot be compared"
        )
    shorter = min((one.model, other.model), key=lambda model: model.max_position_embeddings)
    input_ids = _input_ids(_tokenizer(one, other, tokenizer), shorter, text, tokens)
    read = input_ids.shape[1]
    left, right = (source_logits(source, input_ids, track) for source in (one, other))
    return Verdict(
        tokens=read,
        largest_difference=float((left - right).abs().max()),
        largest_logit=float(left.abs().max()),
        equal_choices=float((left.argmax(-1) == right.argmax(-1)).float().mean()),
        differing_keys=differences(one.model, other.model),
        unsettled=unsettled_keys(one.model, other.model, read),
    )


def _input_ids(tokenizer: Tokenizer, model: ModelConfig, text: str, tokens: int | None) -> Tensor:
    """The tokens to read: exactly as many as were asked for."""
    if tokens is None:
        return text_ids(tokenizer, model, text)
    if not 1 <= tokens <= model.max_position_embeddings:
        raise ConfigError(
            f"--tokens is {tokens}; the context of both models has {model.max_position_embeddings}, give 1 to that many"
        )
    input_ids = text_ids(tokenizer, model, text, tokens)
    if input_ids.shape[1] < tokens:
        raise ConfigError(f"the text has {input_ids.shape[1]} tokens, --tokens asks for {tokens}; name a longer --text")
    return input_ids


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
