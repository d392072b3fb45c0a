"""Requests and their outputs: prompts, sampling parameters, tokens and text."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from stagdist.errors import ConfigError

MAX_LOGPROBS = 20
"""Log-probabilities of at most this many of the likeliest tokens are given."""

MAX_SEED = 2**63 - 1
"""Largest seed: seeds are int64 tensors on the device."""

SMALLEST_FACTOR = 1e-6
"""Smallest temperature above 0, and smallest repetition penalty: below it, scaled logits would overflow."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    The order of application: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: tokens generated at most, at least 1.
        temperature: 0 takes the likeliest token; else at least `SMALLEST_FACTOR`.
        top_k: only the k likeliest tokens are sampled from.
        top_p: only the smallest set of likeliest tokens with at least this probability is sampled from; 1 means all.
        min_p: tokens below this share of the likeliest one's probability are left out.
        repetition_penalty: logits of tokens of the prompt and of the output are divided by it where positive and
            multiplied by it where negative, as in CTRL and Hugging Face; 1 changes nothing.
        seed: equal seeds give equal samples, whatever else is decoded at the same time.
        stop: the text ends before the first of these.
        stop_token_ids: the output ends with the first of these.
        ignore_end_of_document: continue after an end-of-text token.
        logprobs: None gives none; n gives those of each chosen token and of the n likeliest ones, of the model's
            own distribution, before penalty and temperature.

    Raises:
        ConfigError: a value that cannot work.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_end_of_document: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, None, "an integer, at least 1")
        if _number("temperature", self.temperature) != 0:
            remedy = f"0 for the likeliest token, or at least {SMALLEST_FACTOR}"
            _check("temperature", self.temperature, self.temperature >= SMALLEST_FACTOR, remedy)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 1, MAX_SEED, "an integer, at least 1, or nothing for all")
        _check("top_p", self.top_p, 0 < _number("top_p", self.top_p) <= 1, "above 0 and at most 1 (1 keeps all tokens)")
        _check("min_p", self.min_p, 0 <= _number("min_p", self.min_p) <= 1, "0 (keeps all tokens) to 1")
        penalty = _number("repetition_penalty", self.repetition_penalty)
        limits = SMALLEST_FACTOR, 1 / SMALLEST_FACTOR
        remedy = f"above 0 ({limits[0]:g} to {limits[1]:g}); 1 changes nothing"
        _check("repetition_penalty", self.repetition_penalty, limits[0] <= penalty <= limits[1], remedy)
        _check_int("seed", self.seed, 0, MAX_SEED, f"an integer from 0 to {MAX_SEED}")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, or nothing for none")
        flag = self.ignore_end_of_document
        _check("ignore_end_of_document", flag, isinstance(flag, bool), "true or false")
        strings, ids = "a list of strings, none of them empty", "a list of token ids, 0 or more each"
        stop = _checked_tuple("stop", self.stop, lambda text: isinstance(text, str) and text != "", strings)
        stop_ids = _checked_tuple("stop_token_ids", self.stop_token_ids, lambda each: _is_int(each) and each >= 0, ids)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_ids)


def _check(name: str, value: Any, right: bool, remedy: str) -> None:
    if not right:
        raise ConfigError(f"{name} is {value!r}; give {remedy}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: Any, low: int, high: int | None, remedy: str) -> None:
    _check(name, value, _is_int(value) and low <= value and (high is None or value <= high), remedy)


def _number(name: str, value: Any) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    _check(name, value, right and abs(value) <= sys.float_info.max, "a finite number")  # NaN compares false
    return float(value)


def _checked_tuple(name: str, values: Any, fits: Callable[[Any], bool], remedy: str) -> tuple[Any, ...]:
    # A bare string would be taken letter by letter.
    _check(name, values, isinstance(values, list | tuple) and all(map(fits, values)), remedy)
    return tuple(values)


@dataclass(frozen=True)
class Request:
    """A prompt and its sampling parameters; `check_request` checks it for a model."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """A stop string, a stop id or a token that ends texts."""
    LENGTH = "length"
    """The maximum number of new tokens, or the end of the context."""
    ERROR = "error"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one generated token: its own, and (token id, logprob) of the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """New tokens and text of a request since its previous output, or all of them (`join_outputs`).

    Attributes:
        token_ids: new tokens.
        text: new text; characters follow their tokens when they are complete and no stop string can be in them.
        logprobs: of the new tokens, where asked for.
        finish_reason: None until the request ends.
        error: why it failed, with `FinishReason.ERROR`.
        time_to_first_token_s: seconds from the submission to the first token.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    time_to_first_token_s: float | None = None


def join_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """All outputs of a request as one."""
    return replace(
        outputs[-1],
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
    )


def check_request(request: Request, *, vocab_size: int, max_context: int) -> None:
    """Refuse a request that this model cannot serve; others are not affected.

    Raises:
        ConfigError: the prompt is empty, longer than `max_context` tokens, or holds something that is not an id of
            the vocabulary; a stop id is none.
    """
    name, prompt = f"request {request.request_id!r}", request.prompt_ids
    if not prompt:
        raise ConfigError(f"{name}: the prompt is empty; give at least one token (the end-of-document token will do)")
    if len(prompt) > max_context:
        raise ConfigError(
            f"{name}: the prompt has {len(prompt)} tokens and the model's context is {max_context}; "
            f"shorten it by at least {len(prompt) - max_context} tokens"
        )
    _check_ids(name, "the prompt", prompt, vocab_size)
    _check_ids(name, "stop_token_ids", request.params.stop_token_ids, vocab_size)


def _check_ids(name: str, where: str, ids: Sequence[Any], vocab_size: int) -> None:
    for position, token in enumerate(ids):
        if not _is_int(token):
            kind = type(token).__name__
            raise ConfigError(f"{name}: {where} holds {token!r} ({kind}) at position {position}; give integers")
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"{name}: {where} holds the id {token} at position {position}, outside of the vocabulary of "
                f"{vocab_size}; was it made with another tokenizer?"
            )


def allowed_new_tokens(request: Request, max_context: int) -> int:
    """Tokens that a request may generate: the last one is never fed back, so it needs no place in the context."""
    return min(request.params.max_new_tokens, max_context - len(request.prompt_ids) + 1)
