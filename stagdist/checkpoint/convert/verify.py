"""Compare two models by their logits on real text.

Most keys that differ are settled by any text: sequential sections that are cut elsewhere, a copy of a shared weight or
a context of another length change the logits or they do not. A few keys may show an effect only at late positions, or
a smaller one than the tolerance: see `unsettled_keys`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.convert.find import NoTokenizerError, open_weights, source_tokenizer
from stagdist.checkpoint.convert.proof import TEXT, source_logits, text_ids
from stagdist.checkpoint.weight_source import Track, WeightSource, untracked
from stagdist.config.loading import differences
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError, ConfigError
from stagdist.model.rotary import inverse_frequencies


@dataclass(frozen=True)
class Verdict:
    """How two models compare on a text.

    Attributes:
        tokens: tokens of the text that were used.
        largest_difference: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the first model, for comparison.
        equal_choices: share of positions where both rank the same token first.
        differing_keys: keys in which the two configurations differ, with both values; most do not change the function.
        unsettled: those that change the function although the text may not show it; see `unsettled_keys`.
    """

    tokens: int
    largest_difference: float
    largest_logit: float
    equal_choices: float
    differing_keys: dict[str, tuple[Any, Any]]
    unsettled: dict[str, int | None]

    def same(self, tolerance: float) -> bool:
        """Whether the two models compute the same function, as far as the text can show."""
        return self.largest_difference <= tolerance and not self.unsettled

    def remarks(self) -> Iterator[str]:
        """One line for each key that differs."""
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
    track: Track[Any] = untracked,
) -> Verdict:
    """Run both models on the same tokens in fp32, and compare their configurations.

    Args:
        text: the text to read from its beginning.
        tokens: number of tokens, up to the context of both models; None for up to `MAX_TOKENS`.
        tokenizer: path of the tokenizer; None for that of the first model, else of the second.
        track: shows progress by the parameters that were read.

    Raises:
        CheckpointError: a model cannot be read, or the vocabularies differ.
        ConfigError: the text or the context has fewer tokens.
    """
    one, other = open_weights(first), open_weights(second)
    if one.model.vocab_size != other.model.vocab_size:
        raise CheckpointError(
            f"{one.directory} has {one.model.vocab_size} tokens, {other.directory} {other.model.vocab_size}; their "
            "logits cannot be compared"
        )
    shorter = min((one.model, other.model), key=lambda model: model.max_position_embeddings)
    input_ids = _input_ids(_tokenizer(one, other, tokenizer), shorter, text, tokens)
    read = input_ids.shape[1]
    left, right = (source_logits(source, input_ids, track) for source in (one, other))
    for source in (one, other):
        source.check()
    return Verdict(
        tokens=read,
        largest_difference=float((left - right).abs().max()),
        largest_logit=float(left.abs().max()),
        equal_choices=float((left.argmax(-1) == right.argmax(-1)).float().mean()),
        differing_keys=differences(one.model, other.model),
        unsettled=unsettled_keys(one.model, other.model, read),
    )


def _input_ids(tokenizer: Tokenizer, model: ModelConfig, text: str, tokens: int | None) -> Tensor:
    """The tokens to read: exactly as many as requested."""
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
    """The given tokenizer, else that of the first model that has one."""
    try:
        return source_tokenizer(one, given)
    except NoTokenizerError:
        if given is not None:
            raise
        return source_tokenizer(other, None)


def unsettled_keys(first: ModelConfig, second: ModelConfig, tokens: int) -> dict[str, int | None]:
    """Keys that equal logits do not settle, each with the number of tokens that would; None where no text does.

    A window matters if it hides something within the context of both models, the rotary embedding if its wavelengths
    differ. Their effect grows with the position, so the complete context must be read. The epsilon of the norms shows
    where activations are small, which may be in another text.

    Args:
        tokens: number of tokens that were read.
    """
    changed = differences(first, second)
    context = min(first.max_position_embeddings, second.max_position_embeddings)
    late = []
    if _reach(first, context) != _reach(second, context):
        late.append("cross_attention_window")
    if not torch.equal(inverse_frequencies(first), inverse_frequencies(second)):
        late.append("rope_")
    found: dict[str, int | None] = {}
    if tokens < context:
        found |= {key: context for key in changed if key.startswith(tuple(late))}
    if "rms_norm_eps" in changed:
        found["rms_norm_eps"] = None
    return found


def _reach(model: ModelConfig, context: int) -> int:
    """Largest number of memory positions that a position attends to."""
    if not model.staggered or model.num_sections == 1:
        return context
    return min(model.cross_attention_window or context, context)
