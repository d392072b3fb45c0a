"""Plain sampling of a short text: the whole context is computed again for every token. A reference, not fast."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stagdist.errors import ConfigError

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not, or not yet, a character."""


def generate_by_recomputation(
    logits: Callable[[Tensor], Tensor],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    max_context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    end_of_document: int | None = None,
) -> list[int]:
    """Continue a prompt token by token.

    The noise comes from a generator on the CPU, so one seed gives one text wherever the model runs.

    Args:
        logits: input_ids [1, S] -> [1, S, V]; called without gradients.
        prompt_ids: at least one token.
        max_new_tokens: tokens generated at most.
        max_context: tokens the model can read; older ones are left out of a longer text.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among the k likeliest only; None among all.
        seed: seed of the noise.
        end_of_document: token that ends the text; it is not returned.

    Returns:
        The new tokens, without the prompt.

    Raises:
        ConfigError: a setting cannot work.
    """
    _check_settings(prompt_ids, max_new_tokens, max_context, temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            scores = logits(torch.tensor([ids[-max_context:]]))[0, -1]
        token = sample_token(scores, temperature=temperature, top_k=top_k, generator=generator)
        if token == end_of_document:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]


def sample_token(scores: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Choose one token.

    Shapes: scores [V], minus infinity where a token must not be chosen.
    """
    scores = scores.detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(scores.argmax())
    if top_k is not None and top_k < len(scores):
        kept = scores.topk(top_k)
        scores = torch.full_like(scores, -torch.inf).scatter(0, kept.indices, kept.values)
    probabilities = torch.softmax(scores / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def decode_whole_characters(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> str:
    """Text of the tokens, without the pieces of a character whose last bytes were not generated.

    Args:
        decode: the tokenizer's, which writes U+FFFD for bytes that are no character; only those at the end are
            taken off, broken bytes in the middle stay visible.
        ids: prompt and new tokens together, since a character may begin in the one and end in the other.
    """
    return decode(ids).rstrip(REPLACEMENT)


def _check_settings(
    prompt_ids: Sequence[int], max_new_tokens: int, max_context: int, temperature: float, top_k: int | None
) -> None:
    if len(prompt_ids) == 0:
        raise ConfigError("the prompt has no tokens; give at least one, for example the end-of-document token")
    if max_new_tokens < 0 or max_context < 1:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} must be at least 0 and max_context {max_context} at least 1"
        )
    if temperature < 0:
        raise ConfigError(f"temperature {temperature} is negative; 0 takes the likeliest token, 1 samples as learned")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k} must be at least 1; leave it out to choose among all tokens")
