"""What one step of the sampler computes and sends, derived from the sampling parameters of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)


def is_plain(params: SamplingParams) -> bool:
    """Whether a request needs nothing but the id of the likeliest token."""
    changed = params.repetition_penalty != 1 or _counts(params) or is_biased(params) or params.min_tokens > 0
    return not _is_sampled(params) and params.logprobs is None and not changed


def is_biased(params: SamplingParams) -> bool:
    """Whether something is added to logits, minus infinity where tokens are not allowed."""
    return bool(params.logit_bias) or params.allowed_token_ids is not None


class Mode(Enum):
    """What a captured step does to choose tokens. Each mode also serves rows that need less.

    Attributes:
        GREEDY: takes the likeliest tokens.
        SAMPLED: applies bias, penalties, `min_tokens`, temperature and noise.
        TRUNCATED: applies top-k, top-p and min-p in addition, where one rank holds the complete head.
        OTHER: ends with the logits; `Sampler.candidates` and `Sampler.choose` take tokens from them afterwards.
    """

    GREEDY = "greedy"
    SAMPLED = "sampled"
    TRUNCATED = "truncated"
    OTHER = "other"


def mode_of(row_params: Sequence[SamplingParams | None], *, is_complete: bool, want_margins: bool) -> Mode:
    """The mode of a step.

    Args:
        row_params: one entry per row; None for a row without a request.
        is_complete: one rank holds the complete head.
    """
    params = [each for each in row_params if each is not None]
    if want_margins or any(each.logprobs is not None for each in params):
        return Mode.OTHER
    if any(map(_is_truncated, params)):
        return Mode.TRUNCATED if is_complete else Mode.OTHER
    return Mode.GREEDY if all(map(is_plain, params)) else Mode.SAMPLED


FLOATS = ("top_p", "min_p", "temperature", "repetition", "presence", "frequency", "noisy", "truncated")


def row_integers(params: SamplingParams | None, vocab_size: int) -> tuple[int, int]:
    """Seed and top-k of a row."""
    params = params or _GREEDY
    return params.seed, params.top_k or vocab_size


def row_floats(params: SamplingParams | None) -> tuple[float, ...]:
    """The numbers of a row named by `FLOATS`. Those of an unused row change nothing."""
    params = params or _GREEDY
    return (
        params.top_p if params.top_p < 1 else float("inf"),  # rounding must not remove tokens when all are kept
        params.min_p,
        params.temperature if _is_sampled(params) else 1.0,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        float(_is_sampled(params) and not _is_truncated(params)),
        float(_is_truncated(params)),
    )


def _counts(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


@dataclass(frozen=True)
class SamplingPlan:
    """What a step computes and sends; the tensors are parameters of its B rows on the device.

    Attributes:
        num_candidates: columns of each of: scores, ids, and unchanged logits where log-probabilities are requested.
        num_logprobs: the most that any row requests; None if no row requests any.
        num_likeliest: likeliest tokens that one slice sends for them.
        temperature: None if it changes no row.
        repetition: None if no row has this penalty.
        presence, frequency: None if no row has either.
        is_biased: logits of a row are biased, or not all tokens are allowed.
        keeps_going: a row must not end before `min_tokens`.
        noisy: 1.0 where noise is added before candidates are taken, else 0.0; None if there is no such row.
        truncated: where noise is added after truncation; None if there is no such row.

    Shapes: slots and seeds int64 [B]; top_k int64 [B, 1]; truncated bool [B, 1]; the others float64 [B, 1].
    """

    num_candidates: int
    num_logprobs: int | None
    num_likeliest: int
    slots: Tensor
    seeds: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    temperature: Tensor | None
    repetition: Tensor | None
    presence: Tensor | None
    frequency: Tensor | None
    is_biased: bool
    keeps_going: bool
    noisy: Tensor | None
    truncated: Tensor | None


def plan_sampling(
    slots: Sequence[int],
    row_params: Sequence[SamplingParams | None],
    device: Device,
    *,
    vocab_size: int,
    slice_size: int,
    want_margins: bool,
) -> SamplingPlan | None:
    """The plan of a step; None if all rows are plain and no margins are requested.

    Args:
        row_params: one entry per slot; None for a slot without a request.
        slice_size: the largest number of tokens on any rank.
    """
    params = [each or _GREEDY for each in row_params]
    if all(map(is_plain, params)) and not want_margins:
        return None
    # Truncation needs the k best tokens of every slice, or all of them.
    sizes = [each.top_k or slice_size for each in params if _is_truncated(each)]
    num_logprobs = max((each.logprobs for each in params if each.logprobs is not None), default=None)
    integers = [(slot, *row_integers(each, vocab_size)) for slot, each in zip(slots, params, strict=True)]
    floats = [row_floats(each) for each in params]
    slot_index, seeds, top_k = device.upload(integers, torch.int64).unbind(1)
    columns = device.upload(floats, torch.float64).unsqueeze(-1).unbind(1)
    top_p, min_p, temperature, repetition, presence, frequency, noisy, truncated = columns
    counted = any(map(_counts, params))
    return SamplingPlan(
        num_candidates=min(max([2 if want_margins else 1, *sizes]), slice_size),
        num_logprobs=num_logprobs,
        num_likeliest=min(num_logprobs or 0, slice_size),
        slots=slot_index,
        seeds=seeds.contiguous(),
        top_k=top_k[:, None],
        top_p=top_p,
        min_p=min_p,
        temperature=temperature if any(_is_sampled(each) and each.temperature != 1 for each in params) else None,
        repetition=repetition if any(each.repetition_penalty != 1 for each in params) else None,
        presence=presence if counted else None,
        frequency=frequency if counted else None,
        is_biased=any(map(is_biased, params)),
        keeps_going=any(each.min_tokens for each in params),
        noisy=noisy if any(_is_sampled(each) and not _is_truncated(each) for each in params) else None,
        truncated=truncated > 0 if any(map(_is_truncated, params)) else None,
    )


def _is_sampled(params: SamplingParams) -> bool:
    """Whether more than one token can be chosen."""
    return params.temperature > 0 and params.top_k != 1


def _is_truncated(params: SamplingParams) -> bool:
    return _is_sampled(params) and (params.top_k is not None or params.top_p < 1 or params.min_p > 0)
