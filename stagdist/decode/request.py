"""Requests and their outputs: prompts, sampling parameters, tokens and text."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from stagdist.errors import ConfigError

MAX_LOGPROBS = 20
"""Log-probabilities of at most this many of the likeliest tokens are given."""

MAX_INT64 = 2**63 - 1
"""Largest seed and count: tensors of seeds and messages between ranks hold int64."""

MAX_BIAS = 100
"""Largest absolute value of a logit bias, as in OpenAI's API."""

SMALLEST_FACTOR = 1e-6
"""Smallest temperature above 0, and smallest repetition penalty: below it, scaled logits would overflow."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    The order of application is vLLM's: allowed tokens and `min_tokens`, logit bias, repetition penalty, frequency and
    presence penalty, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: tokens generated at most; 0 only scores the prompt and needs `prompt_logprobs`.
        temperature: 0 takes the likeliest token; else at least `SMALLEST_FACTOR`.
        top_k: only the k likeliest tokens are sampled from.
        top_p: only the smallest set of likeliest tokens with at least this probability is sampled from; 1 means all.
        min_p: tokens below this share of the likeliest one's probability are left out.
        repetition_penalty: logits of tokens of the prompt and of the output are divided by it where positive and
            multiplied by it where negative, as in CTRL and Hugging Face; 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens that were generated before, -2 to 2 as in OpenAI's API.
        frequency_penalty: subtracted from them once for each time that the token was generated, -2 to 2.
        logit_bias: (token id, number) pairs or a mapping; each number, -100 to 100, is added to the logit of its token.
        allowed_token_ids: no other token is chosen; None allows all.
        min_tokens: no token that ends the output is chosen before so many tokens, and their text has no stop string.
        seed: equal seeds give equal samples, whatever else is decoded at the same time.
        stop: the text ends before the first of these.
        include_stop_str_in_output: the text ends after the stop string.
        stop_token_ids: the output ends with the first of these.
        ignore_end_of_document: continue after an end-of-text token.
        skip_special_tokens: special tokens have no text.
        logprobs: None gives none; n gives those of each chosen token and of the n likeliest ones, of the model's
            own distribution, before penalty and temperature.
        prompt_logprobs: the same for the tokens of the prompt after the first.

    Raises:
        ConfigError: a value that cannot work.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_end_of_document: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        fewest = 1 if self.prompt_logprobs is None else 0
        remedy = f"an integer from 1 to {MAX_INT64} (0 only scores the prompt and needs prompt_logprobs)"
        _check_int("max_new_tokens", self.max_new_tokens, fewest, MAX_INT64, remedy)
        remedy = f"an integer from 0 to max_new_tokens ({self.max_new_tokens})"
        _check_int("min_tokens", self.min_tokens, 0, self.max_new_tokens, remedy)
        if _number("temperature", self.temperature) != 0:
            remedy = f"0 for the likeliest token, or at least {SMALLEST_FACTOR}"
            _check("temperature", self.temperature, self.temperature >= SMALLEST_FACTOR, remedy)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 1, MAX_INT64, "an integer, at least 1, or nothing for all")
        _check("top_p", self.top_p, 0 < _number("top_p", self.top_p) <= 1, "above 0 and at most 1 (1 keeps all tokens)")
        _check("min_p", self.min_p, 0 <= _number("min_p", self.min_p) <= 1, "0 (keeps all tokens) to 1")
        penalty = _number("repetition_penalty", self.repetition_penalty)
        limits = SMALLEST_FACTOR, 1 / SMALLEST_FACTOR
        remedy = f"above 0 ({limits[0]:g} to {limits[1]:g}); 1 changes nothing"
        _check("repetition_penalty", self.repetition_penalty, limits[0] <= penalty <= limits[1], remedy)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, -2 <= _number(name, value) <= 2, "-2 to 2; 0 changes nothing")
        _check_int("seed", self.seed, 0, MAX_INT64, f"an integer from 0 to {MAX_INT64}")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _check_int(name, count, 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, or nothing for none")
        for name in ("ignore_end_of_document", "include_stop_str_in_output", "skip_special_tokens"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "true or false")
        self._check_lists()

    def _check_lists(self) -> None:
        """Check the lists and make them tuples."""
        strings, ids = "a list of strings, none of them empty", "a list of token ids, 0 or more each"
        stop = _checked_tuple("stop", self.stop, lambda text: isinstance(text, str) and text != "", strings)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _checked_tuple("stop_token_ids", self.stop_token_ids, _is_id, ids))
        if self.allowed_token_ids is not None:
            allowed = _checked_tuple("allowed_token_ids", self.allowed_token_ids, _is_id, ids)
            _check("allowed_token_ids", allowed, allowed != (), "at least one token id, or nothing to allow all")
            object.__setattr__(self, "allowed_token_ids", allowed)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))


def _check(name: str, value: Any, right: bool, remedy: str) -> None:
    if not right:
        raise ConfigError(f"{name} is {value!r}; give {remedy}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _check_int(name: str, value: Any, low: int, high: int, remedy: str) -> None:
    _check(name, value, _is_int(value) and low <= value <= high, remedy)


def _number(name: str, value: Any) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    _check(name, value, right and abs(value) <= sys.float_info.max, "a finite number")  # NaN compares false
    return float(value)


def _checked_tuple(name: str, values: Any, fits: Callable[[Any], bool], remedy: str) -> tuple[Any, ...]:
    # A bare string would be taken letter by letter.
    _check(name, values, isinstance(values, list | tuple) and all(map(fits, values)), remedy)
    return tuple(values)


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    remedy = "token ids, each with a number"
    pairs = list(bias.items()) if isinstance(bias, Mapping) else bias
    right = isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    _check("logit_bias", bias, right, remedy)
    # The keys of an object in JSON are strings.
    ids = [int(token) if isinstance(token, str) and token.isdecimal() else token for token, _ in pairs]
    _check("logit_bias", bias, all(map(_is_id, ids)), remedy)
    _check("logit_bias", bias, len(set(ids)) == len(ids), f"{remedy}, and each token id once")
    numbers = [(token, f"logit_bias of token {token}", value) for token, (_, value) in zip(ids, pairs, strict=True)]
    for _, name, value in numbers:
        _check(name, value, abs(_number(name, value)) <= MAX_BIAS, f"-{MAX_BIAS} to {MAX_BIAS}")
    return tuple((token, float(value)) for token, _, value in numbers)


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
    TIMEOUT = "timeout"
    """The deadline passed, in the queue or later."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of one token: its own, and (token id, logprob) of the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestTimes:
    """When what happened to a request, in seconds of `time.perf_counter`; None for what has not happened."""

    submitted_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """New tokens and text of a request since its previous output, or all of them (`join_outputs`).

    Attributes:
        token_ids: new tokens.
        text: new text; characters follow their tokens when they are complete and no stop string can be in them.
        logprobs: of the new tokens, where asked for.
        prompt_logprobs: of the tokens of the prompt, the first of which has none; given once, where asked for.
        finish_reason: None until the request ends.
        stop_reason: the stop string or the id of the token that ended it, with `FinishReason.STOP`.
        error: why it failed, with `FinishReason.ERROR`.
        prompt_tokens: length of the prompt.
        cached_tokens: tokens of the prompt that were not computed again.
        times: of its events so far.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    times: RequestTimes = RequestTimes(0.0)

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from the submission to the first token."""
        first_s = self.times.first_token_s
        return None if first_s is None else first_s - self.times.submitted_s


def join_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """All outputs of a request as one."""
    return replace(
        outputs[-1],
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=next((each.prompt_logprobs for each in outputs if each.prompt_logprobs is not None), None),
    )


def check_request(request: Request, *, vocab_size: int, max_context: int) -> None:
    """Refuse a request that this model cannot serve; others are not affected.

    Raises:
        ConfigError: the prompt is empty, longer than `max_context` tokens, or holds something that is not an id of
            the vocabulary; another id of the parameters is none; every allowed token ends the output before
            `min_tokens`.
    """
    name, prompt, params = f"request {request.request_id!r}", request.prompt_ids, request.params
    if not prompt:
        raise ConfigError(f"{name}: the prompt is empty; give at least one token (the end-of-document token will do)")
    if len(prompt) > max_context:
        raise ConfigError(
            f"{name}: the prompt has {len(prompt)} tokens and the model's context is {max_context}; "
            f"shorten it by at least {len(prompt) - max_context} tokens"
        )
    _check_ids(name, "the prompt", prompt, vocab_size)
    _check_ids(name, "stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids(name, "allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_ids(name, "logit_bias", [token for token, _ in params.logit_bias], vocab_size)
    allowed = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    ends = frozenset(params.stop_token_ids)
    if params.min_tokens and all(token in ends for token in allowed):
        raise ConfigError(
            f"{name}: min_tokens is {params.min_tokens}, but every allowed token ends the output; allow another one"
        )


def _check_ids(name: str, where: str, ids: Sequence[Any], vocab_size: int) -> None:
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return  # fast: prompts may be long, and a server checks them beside the engine
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
    """Tokens that the engine generates for a request at most; one, which is dropped, to score its prompt.

    The last one is never fed back, so it needs no place in the context.
    """
    return min(max(1, request.params.max_new_tokens), max_context - len(request.prompt_ids) + 1)
