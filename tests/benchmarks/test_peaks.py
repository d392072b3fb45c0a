"""Peaks of tensors phase by phase."""

import torch

from benchmarks.training.memory_site import peak_bytes

MIB = 2**20


def test_a_peak_counts_what_is_held_and_what_was_dropped_again() -> None:
    kept: list[torch.Tensor] = []

    def keep() -> None:
        kept.append(torch.zeros(4 * MIB, dtype=torch.uint8))

    def drop() -> None:
        for _ in range(3):
            torch.zeros(2 * MIB, dtype=torch.uint8)

    peaks = peak_bytes({"keep": keep, "drop": drop, "rest": lambda: torch.zeros(1)}, "cpu")
    assert peaks["keep"] == 4 * MIB
    assert peaks["drop"] == 6 * MIB, "one after the other, beside what the phase before kept"
    assert 4 * MIB < peaks["rest"] < 4 * MIB + 1024


def test_tensors_made_before_do_not_count() -> None:
    before = [torch.zeros(8 * MIB, dtype=torch.uint8)]
    peaks = peak_bytes({"drop": before.clear, "make": lambda: torch.zeros(MIB, dtype=torch.uint8)}, "cpu")
    assert peaks == {"drop": 0, "make": MIB}
