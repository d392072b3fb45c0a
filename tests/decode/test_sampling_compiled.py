"""Kernels that choose tokens compile ahead of time for GPUs, without spilling registers."""

import pytest
import torch

from stagdist.decode.kernels import sampling
from stagdist.decode.kernels.scores import COLUMNS
from tests.decode.kernels.recording import Launch, recording

LARGE = 262144


def launches(vocab: int, rows: int) -> list[Launch]:
    """Every launch that differs from the others, of all ways of choosing, on one rank and on several."""

    def memory(dtype: torch.dtype, *size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    integers = memory(torch.int64, rows, COLUMNS.value), memory(torch.int64, rows)
    masks = memory(torch.bool, rows, vocab), memory(torch.float32, rows, vocab), memory(torch.bool, rows, vocab)
    state = sampling.SamplingTables(*integers, *masks, memory(torch.int32, rows, vocab))
    kernels = sampling.SamplingKernels(state, 0, vocab, vocab)
    logits, positions = memory(torch.bfloat16, rows, vocab), memory(torch.int64, rows)
    with recording() as recorded:
        for gather in (None, lambda message: message[None]):
            kernels.greedy(logits, gather)
            kernels.sampled(logits, positions, gather)
        kernels.truncated(logits, positions)
    return list(dict.fromkeys(recorded.launches))


def spilled_bytes(launch: Launch, capability: int) -> int:
    """Bytes of registers that a thread keeps in memory."""
    resources = launch.resources(capability)
    assert resources["REG"] > 0
    return resources["LOCAL"] + resources["STACK"]


def test_kernels_compile_for_the_newest_gpu_and_largest_vocabulary() -> None:
    found = launches(LARGE, 1)
    kernels = {"likeliest_kernel", "score_kernel", "merge_kernel", "narrow_kernel", "pick_kernel"}
    assert {launch.name for launch in found} == kernels
    for launch in found:
        assert spilled_bytes(launch, 90) == 0, launch


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("vocab", "capability"), [(LARGE, 80), (32000, 80), (32000, 90)])
def test_kernels_compile_for_other_gpus_and_vocabularies(vocab: int, capability: int, rows: int) -> None:
    for launch in launches(vocab, rows):
        assert spilled_bytes(launch, capability) == 0, launch


@pytest.mark.slow
def test_registers_that_do_not_fit_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: four times the tokens at a time."""
    monkeypatch.setattr(sampling, "CHUNK", 4 * sampling.CHUNK)
    assert any(spilled_bytes(launch, 90) > 0 for launch in launches(LARGE, 1) if launch.name == "narrow_kernel")
