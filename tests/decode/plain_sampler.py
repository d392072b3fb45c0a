"""A plain implementation of sampling, and samplers of several ranks that are compared with it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.noise import gumbel
from stagdist.decode.sampling.sampler import Choice, Sampler

VOCAB = 37
CPU = Device("cpu", torch.float32)
# (first token, logits) of each rank
CUTS = {
    "one": [(0, 37)],
    "two": [(0, 20), (20, 17)],
    "three": [(0, 25), (25, 9), (34, 3)],
    "empty at the end": [(0, 30), (30, 7), (37, 0)],
    "empty first": [(0, 0), (0, 36), (36, 1)],
    "padded": [(0, 16), (16, 16), (32, 16)],
    "only padding": [(0, 37), (37, 37)],
}
PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(seed=3),
    "hot": SamplingParams(temperature=1.7, seed=2**63 - 1),
    "cold": SamplingParams(temperature=0.3, seed=5),
    "top_k": SamplingParams(top_k=5, seed=6),
    "top_1": SamplingParams(top_k=1),
    "top_k of more than there is": SamplingParams(top_k=1000, seed=7),
    "top_p": SamplingParams(top_p=0.6, seed=8),
    "tiny top_p": SamplingParams(top_p=1e-9, seed=8),
    "min_p": SamplingParams(min_p=0.2, seed=9),
    "all": SamplingParams(
        temperature=0.8, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=10, logprobs=3
    ),
    "penalty": SamplingParams(temperature=0, repetition_penalty=2.0),
    "reward": SamplingParams(temperature=1.2, repetition_penalty=0.5, seed=12, logprobs=0),
    "logprobs": SamplingParams(temperature=0, logprobs=5),
    "sampled logprobs": SamplingParams(temperature=0.9, seed=11, logprobs=20),
    "presence": SamplingParams(temperature=0, presence_penalty=1.5),
    "frequency": SamplingParams(seed=13, frequency_penalty=0.7),
    "frequency that rewards": SamplingParams(temperature=0, frequency_penalty=-2.0, presence_penalty=0.3, logprobs=2),
    "bias": SamplingParams(temperature=0, logit_bias=((36, 3.0), (2, -100.0), (20, 1.25))),
    "allowed": SamplingParams(temperature=0, allowed_token_ids=(35, 4, 21, 4)),
    "one allowed": SamplingParams(seed=14, allowed_token_ids=(19,)),
    "min tokens": SamplingParams(temperature=0, min_tokens=7, stop_token_ids=tuple(range(0, 37, 2))),
    "min tokens, sampled": SamplingParams(seed=15, top_p=0.9, min_tokens=4, stop_token_ids=tuple(range(30))),
    "every change": SamplingParams(
        temperature=1.3,
        top_k=9,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.4,
        presence_penalty=-0.8,
        frequency_penalty=0.6,
        logit_bias=((1, 2.5), (34, -1.0), (30, 4.0)),
        allowed_token_ids=tuple(range(36)),
        min_tokens=6,
        stop_token_ids=(1, 30),
        seed=16,
        logprobs=4,
    ),
}


def samplers(
    cut: Sequence[tuple[int, int]], vocab: int = VOCAB, slots: int = 32, margins: bool = False
) -> list[Sampler]:
    """A sampler for each rank."""
    return [
        Sampler(
            num_slots=slots,
            vocab_size=vocab,
            first_token=first,
            num_tokens=count,
            slice_size=max(size for _, size in cut),
            device=CPU,
            want_margins=margins,
        )
        for first, count in cut
    ]


def step(
    ranks: Sequence[Sampler],
    cut: Sequence[tuple[int, int]],
    logits: torch.Tensor,
    slots: Sequence[int],
    positions: Sequence[int],
) -> Choice:
    """One step of all ranks; checks that every rank has the same outcome."""
    where, padded = torch.tensor(positions), torch.nn.functional.pad(logits, (0, 100), value=float("-inf"))
    messages = [
        rank.candidates(padded[:, first : first + count], slots, where)
        for rank, (first, count) in zip(ranks, cut, strict=True)
    ]
    choices = [rank.choose(torch.stack(messages), slots, where) for rank in ranks]
    for choice in choices:
        assert torch.equal(choice.tokens, choices[0].tokens)
    return choices[0]


def plain_scores(raw: np.ndarray, params: SamplingParams, prompt: Sequence[int], generated: list[int]) -> np.ndarray:
    """Logits changed by the formulas of vLLM's documentation, in its order, one token at a time."""
    scores = raw.copy()
    for token in range(len(raw)):
        count = generated.count(token)
        if len(generated) < params.min_tokens and token in params.stop_token_ids:
            scores[token] = -np.inf
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            scores[token] = -np.inf
        scores[token] += dict(params.logit_bias).get(token, 0.0)
        if token in prompt or count:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= count * params.frequency_penalty
        scores[token] -= params.presence_penalty if count else 0.0
    return scores


def plain_choice(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], generated: list[int], position: int
) -> tuple[int, np.ndarray]:
    """Token and log-probabilities by the textbook, one row at a time."""
    raw = logits.astype(np.float64)
    logprobs = raw - raw.max() - math.log(np.exp(raw - raw.max()).sum())
    scores = plain_scores(raw, params, prompt, generated)
    if params.temperature == 0:
        return int(scores.argmax()), logprobs
    scores /= params.temperature
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[: params.top_k]
    weights = np.exp(scores[order] - scores[order[0]])
    weights /= weights.sum()
    kept: list[tuple[int, float]] = []
    for token, weight in zip(order, weights, strict=True):
        if params.top_p == 1 or weights[: len(kept)].sum() < params.top_p:
            kept.append((token, weight))
    kept = [(token, weight) for token, weight in kept if weight >= params.min_p * weights[0]]
    noise = gumbel(torch.tensor([params.seed]), torch.tensor([position]), torch.arange(len(scores)))[0].numpy()
    return max((token for token, _ in kept), key=lambda token: (scores[token] + noise[token], -token)), logprobs


def check_logprobs(found: Sequence[float], params: SamplingParams, token: int, expected: np.ndarray) -> None:
    """The chosen token's, and the likeliest ones in order."""
    width = (len(found) - 1) // 2
    assert found[0] == pytest.approx(expected[token], abs=1e-12)
    order = sorted(range(len(expected)), key=lambda each: (-expected[each], each))[: params.logprobs]
    assert list(found[1 : 1 + len(order)]) == order
    assert list(found[1 + width : 1 + width + len(order)]) == pytest.approx(list(expected[order]), abs=1e-12)


def make_logits(steps: int, batch: int, vocab: int = VOCAB, ties: bool = False) -> torch.Tensor:
    """Random logits; with ties they have three values only."""
    generator = torch.Generator().manual_seed(steps)
    logits = torch.randn(steps, batch, vocab, generator=generator) * 2
    return logits.clamp(-1, 1).round() if ties else logits
