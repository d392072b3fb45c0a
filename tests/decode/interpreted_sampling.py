"""Kernels that choose tokens in Triton's interpreter, beside the plain path; run in a process of its own.

The interpreter takes the place of the compiler when `TRITON_INTERPRET=1` is set before Triton is imported.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.sampler import Sampler
from stagdist.decode.sampling.sampling_plan import Mode
from tests.decode.captured_sampling import captured_samplers, captured_step
from tests.decode.plain_sampler import make_logits


@dataclass(frozen=True)
class Case:
    """Steps of all slots, on the plain path and with kernels.

    Attributes:
        requests: of each slot; None for a slot without.
        cut: (first token, logits) of each rank.
        logits: of every step, [rows, V]; random ones if None.
        block: tokens of a program.
        passes: of truncation.
    """

    mode: Mode
    requests: Sequence[SamplingParams | None]
    cut: Sequence[tuple[int, int]]
    vocab: int
    logits: Tensor | None = None
    ties: bool = False
    dtype: torch.dtype = torch.float32
    steps: int = 1
    block: int = 1024
    passes: int = 10
    prompt: Sequence[int] = field(default=(3, 3, 30))


def compare(cases: Sequence[Case]) -> list[tuple[Tensor, Tensor, bool, int]]:
    """Run cases; of each: tokens [steps, rows] of both, whether penalties saw the same, kernels launched per step."""
    from triton.runtime.interpreter import InterpretedFunction

    call, patched = InterpretedFunction.__call__, set()

    def call_quickly(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        """Call a device function. Its language is patched the first time and stays so; to repeat it takes long."""
        if self.fn in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn)
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_quickly
    warnings.simplefilter("ignore")  # of numpy about NaN
    return [_compare(case) for case in cases]


def _compare(case: Case) -> tuple[Tensor, Tensor, bool, int]:
    from triton.runtime.interpreter import GridExecutor

    from stagdist.decode.kernels import sampling

    small = partial(sampling.SamplingKernels, block=case.block, passes=case.passes)
    with patch.object(sampling, "SamplingKernels", small):
        kernels = captured_samplers(case.cut, case.vocab, len(case.requests), kernels=True)
    plain = captured_samplers(case.cut, case.vocab, len(case.requests))
    for slot, params in enumerate(case.requests):
        for rank in [*plain, *kernels]:
            if params is not None:
                rank.admit(slot, params, case.prompt)
    random = make_logits(case.steps, len(case.requests), case.vocab, ties=case.ties)
    tokens: tuple[list[Tensor], list[Tensor]] = ([], [])
    launches = 0
    run = GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        nonlocal launches
        launches += 1
        run(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", counted):
        for number in range(case.steps):
            logits = (random[number] if case.logits is None else case.logits).to(case.dtype)
            places = [len(case.prompt) + number if params else -number for params in case.requests]
            for ranks, found in zip((plain, kernels), tokens, strict=True):
                found.append(captured_step(ranks, case.cut, case.mode, logits, torch.tensor(places)))
    same = all(_penalties_saw_the_same(*both, case.requests) for both in zip(plain, kernels, strict=True))
    return torch.stack(tokens[0]), torch.stack(tokens[1]), same, launches // case.steps


def _penalties_saw_the_same(one: Sampler, other: Sampler, requests: Sequence[SamplingParams | None]) -> bool:
    ours, theirs = one._processor.tensors(), other._processor.tensors()
    counted = [s for s, each in enumerate(requests) if each and (each.presence_penalty or each.frequency_penalty)]
    repeated = [s for s, each in enumerate(requests) if each and each.repetition_penalty != 1]
    return torch.equal(ours["counts"][counted], theirs["counts"][counted]) and torch.equal(
        ours["seen"][repeated], theirs["seen"][repeated]
    )
