"""Samplers of several ranks whose tokens are chosen as in a captured step, all on the device."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.sampler import Sampler
from stagdist.decode.sampling.sampling_plan import Mode, mode_of
from tests.decode.plain_sampler import CPU, PARAMS, VOCAB

CAPTURED = {
    **{name: params for name, params in PARAMS.items() if params.logprobs is None},
    "every change": replace(PARAMS["every change"], logprobs=None),
    "all": replace(PARAMS["all"], logprobs=None),
    "reward": replace(PARAMS["reward"], logprobs=None),
}
"""Parameters that a captured step serves."""


def needs(params: SamplingParams, is_complete: bool = True) -> Mode:
    """The mode of a step with one request."""
    return mode_of([params], is_complete=is_complete, want_margins=False)


def captured_samplers(
    cut: Sequence[tuple[int, int]], vocab: int = VOCAB, slots: int = 32, device: Device = CPU, **options: Any
) -> list[Sampler]:
    """A sampler with tables for each rank."""
    largest = max(size for _, size in cut)
    return [
        Sampler(
            num_slots=slots,
            vocab_size=vocab,
            first_token=first,
            num_tokens=count,
            slice_size=largest,
            device=device,
            captured=True,
            **options,
        )
        for first, count in cut
    ]


def captured_step(
    ranks: Sequence[Sampler], cut: Sequence[tuple[int, int]], mode: Mode, logits: Tensor, positions: Tensor
) -> Tensor:
    """One step of all ranks; checks that every rank has the same tokens.

    The ranks run one after another: the messages are collected first, then each rank continues with all of them.
    """
    padded = torch.nn.functional.pad(logits, (0, 100), value=float("nan"))
    slices = [padded[:, first : first + count] for first, count in cut]
    if len(ranks) == 1:
        return ranks[0].choose_in_graph(mode, slices[0], positions, None)
    messages = [_message(rank, mode, part, positions) for rank, part in zip(ranks, slices, strict=True)]
    tokens = [
        rank.choose_in_graph(mode, part, positions, _giving(torch.stack(messages)))
        for rank, part in zip(ranks, slices, strict=True)
    ]
    for each in tokens:
        assert torch.equal(each, tokens[0])
    return tokens[0]


class _MessageSent(Exception):  # noqa: N818
    """Carries the message of a rank."""

    def __init__(self, message: Tensor) -> None:
        super().__init__()
        self.message = message


def _message(rank: Sampler, mode: Mode, logits: Tensor, positions: Tensor) -> Tensor:
    def send(message: Tensor) -> Tensor:
        raise _MessageSent(message)

    try:
        rank.choose_in_graph(mode, logits, positions, send)
    except _MessageSent as sent:
        return sent.message
    raise AssertionError("the rank did not send a message")


def _giving(gathered: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda message: gathered
