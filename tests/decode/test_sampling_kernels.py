"""Kernels choose the tokens of the plain path, and compile for GPUs without spilling registers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.sampling_plan import Mode
from tests.decode.captured_sampling import CAPTURED, captured_samplers, needs
from tests.decode.interpreted_sampling import Case
from tests.decode.plain_sampler import CUTS, make_logits, samplers, step
from tests.ranks import run_ranks

NAN, INF = float("nan"), float("inf")
TRUNCATED = [params for params in CAPTURED.values() if needs(params) is Mode.TRUNCATED]
SIMPLER = [params for params in CAPTURED.values() if needs(params) is not Mode.TRUNCATED]
LAUNCHES = {Mode.GREEDY: 2, Mode.SAMPLED: 2, Mode.TRUNCATED: 3}


def unusual_logits(vocab: int = 37) -> Tensor:
    """Rows with equal logits, zeros of both signs, NaN, infinities, and numbers that differ by hundreds of digits."""
    rows = torch.zeros(7, vocab, dtype=torch.float64)
    rows[1, ::2] = -0.0
    rows[2, [5, 20]] = NAN
    rows[3, [6, 30]] = INF
    rows[4] = -INF
    rows[5, :30] = -INF
    rows[6] = torch.tensor([0.0, 1e-300, -1e-300, 1e-200, 3.0, 1e-20, -5.0, -4e2])[torch.arange(vocab) % 8]
    return rows


def check(cases: Sequence[Case]) -> None:
    (found,) = run_ranks("tests.decode.interpreted_sampling:compare", 1, list(cases), env={"TRITON_INTERPRET": "1"})
    for case, (plain, kernels, same_penalties, launches) in zip(cases, found, strict=True):
        assert kernels.tolist() == plain.tolist(), case
        assert same_penalties, case
        assert kernels.min() >= 0 and kernels.max() < case.vocab
        expected = LAUNCHES[case.mode] + (case.passes if case.mode is Mode.TRUNCATED else 0)
        if len(case.cut) > 1:  # each rank computes its message, then the same again and its tokens with one kernel more
            expected = len(case.cut) * (2 * expected + 1)
        assert launches == expected


def test_kernels_choose_the_tokens_of_the_plain_path() -> None:
    one, padded, greedy = CUTS["one"], CUTS["padded"], SamplingParams(temperature=0)
    unusual, narrow = unusual_logits(), replace(CAPTURED["top_p"], top_k=7, top_p=0.5)
    sampled = [CAPTURED[name] for name in ("greedy", "hot", "penalty", "reward", "presence", "frequency", "bias")]
    others = [CAPTURED[name] for name in ("allowed", "min tokens", "one allowed")]
    check(
        [
            Case(Mode.GREEDY, [greedy] * 7, one, 37, unusual, dtype=torch.float64, block=16),
            Case(Mode.GREEDY, [greedy] * 7, padded, 37, unusual, block=16),
            Case(Mode.GREEDY, [greedy] * 3, one, 37, dtype=torch.bfloat16, ties=True),
            Case(Mode.SAMPLED, [*sampled, None, *others], one, 37, steps=3, ties=True, prompt=(3, 3, 30, 11)),
            Case(Mode.SAMPLED, [sampled[1]] * 4, padded, 37, unusual[1:5], block=16),
            Case(Mode.SAMPLED, [*sampled[1:5], None], padded, 37, steps=2),
            Case(Mode.TRUNCATED, [*TRUNCATED, *sampled[1:3], None], one, 37, passes=5, block=64),
            Case(Mode.TRUNCATED, [narrow, CAPTURED["top_k"]], one, 37, ties=True, passes=2, block=16, steps=2),
            Case(Mode.TRUNCATED, [CAPTURED["top_k"]] * 7, one, 37, unusual, dtype=torch.float64, passes=3, block=64),
        ]
    )


@pytest.mark.slow
def test_kernels_truncate_as_the_plain_path_does() -> None:
    """Random vocabularies, ties, parameters and blocks; passes that end the search, and too few of them."""
    generator = torch.Generator().manual_seed(5)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    cases = []
    for index in range(12):
        vocab = int(number(2, 150))
        requests = [
            SamplingParams(
                seed=index,
                temperature=number(0.2, 2),
                top_k=None if row == 0 else int(number(2, 1.2 * vocab)),
                top_p=1.0 if row == 1 else number(0.01, 1),
                min_p=number(0, 0.3) if row == 2 else 0.0,
            )
            for row in range(3)
        ]
        requests += [SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0, seed=index), SamplingParams(top_k=vocab + 9)]
        dtype = (torch.float32, torch.bfloat16, torch.float64)[index % 3]
        block, passes, ties = (32, 512)[index // 2 % 2], (1, 10)[index % 2], index % 5 == 0
        cases.append(Case(Mode.TRUNCATED, requests, [(0, vocab)], vocab, None, ties, dtype, block=block, passes=passes))
    for params in (SamplingParams(top_p=0.5), SamplingParams(top_k=9, top_p=0.5), SamplingParams(min_p=0.9)):
        cases.append(Case(Mode.TRUNCATED, [params] * 7, CUTS["one"], 37, unusual_logits(), passes=2, block=16))
        cases.append(Case(Mode.TRUNCATED, [params] * 7, [(0, 32)], 32, unusual_logits(32), block=8))
    check(cases)


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_kernels_choose_the_tokens_of_the_plain_path_on_every_cut(cut: list[tuple[int, int]]) -> None:
    greedy = [SamplingParams(temperature=0)] * 7
    cases = [
        Case(Mode.GREEDY, greedy, cut, 37, unusual_logits(), block=16),
        Case(Mode.SAMPLED, [*SIMPLER, None], cut, 37, steps=6, block=16),
        Case(Mode.SAMPLED, [*SIMPLER, None], cut, 37, steps=6, ties=True),
        Case(Mode.SAMPLED, [CAPTURED["sampled"]] * 7, cut, 37, unusual_logits(), block=16),
    ]
    if len(cut) == 1:
        cases += [Case(Mode.TRUNCATED, list(CAPTURED.values()), cut, 37, steps=3, ties=ties) for ties in (False, True)]
    check(cases)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", LAUNCHES)
def test_a_graph_on_a_gpu_chooses_the_same_tokens_and_is_never_waited_for(mode: Mode) -> None:
    cut, gpu, host = CUTS["one"], Device("cuda", torch.float32), samplers(CUTS["one"])
    requests = [params for params in CAPTURED.values() if mode in (needs(params), Mode.TRUNCATED)]
    (kernels,) = captured_samplers(cut, slots=len(requests), device=gpu, kernels=True)
    logits, slots = make_logits(6, len(requests)), range(len(requests))
    buffer, places = torch.zeros_like(logits[0], device="cuda"), torch.zeros(len(requests), dtype=torch.int64).cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        kernels.choose_in_graph(mode, buffer, places, None)  # compiles
    with torch.cuda.graph(graph, stream=stream):
        tokens = kernels.choose_in_graph(mode, buffer, places, None)
    for shift in range(2):
        for slot in slots:
            host[0].admit(slot, requests[slot - shift], [3, 30, 3])
        for number in range(3):
            buffer.copy_(logits[3 * shift + number])
            places.fill_(3 + number)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for slot in slots if number == 0 else ():
                    kernels.retire(slot)
                    kernels.admit(slot, requests[slot - shift], [3, 30, 3])
                graph.replay()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            expected = step(host, cut, logits[3 * shift + number], slots, [3 + number] * len(slots)).tokens
            assert tokens.tolist() == expected.tolist()
