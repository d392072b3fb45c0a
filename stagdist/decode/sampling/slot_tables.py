"""Sampling parameters of all slots in memory that stays in place, as captured steps need."""

import struct

import torch

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.sampling_plan import FLOATS, SamplingPlan, is_biased, row_floats, row_integers

INTEGERS = ("seed", "top_k", "is_biased")
_FORMAT = f"{len(INTEGERS)}q{len(FLOATS)}d"
_COLUMNS = len(INTEGERS) + len(FLOATS)


class SlotTables:
    """A row of numbers for each slot; those of a free slot change nothing. Kernels read them, too (`kernels.scores`).

    Attributes:
        integers: columns `INTEGERS`, then unused ones.
        floats: the same memory; columns `FLOATS` after as many unused ones as there are integers.

    Shapes: int64 and float64 [slots, columns].
    """

    def __init__(self, num_slots: int, vocab_size: int, device: Device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self.integers = device.upload([self._packed(None)] * num_slots, torch.int64)
        self.floats = self.integers.view(torch.float64)
        self._slots = torch.arange(num_slots, device=device.name)

    def set(self, slot: int, params: SamplingParams | None) -> None:
        """Assign the parameters of a slot, between steps. The host does not wait for the copy."""
        self.integers[slot].copy_(self._device.upload(self._packed(params), torch.int64))

    def plan(self, rows: int, num_candidates: int, *, truncates: bool) -> SamplingPlan:
        """A plan of slots 0 to `rows` - 1 that applies every parameter and reads the tables when it is executed."""
        seeds, top_k, _ = self.integers[:rows, : len(INTEGERS)].unbind(1)
        columns = self.floats[:rows, len(INTEGERS) :].unsqueeze(-1).unbind(1)
        top_p, min_p, temperature, repetition, presence, frequency, noisy, truncated = columns
        return SamplingPlan(
            num_candidates=num_candidates,
            num_logprobs=None,
            num_likeliest=0,
            slots=self._slots[:rows],
            seeds=seeds,
            top_k=top_k[:, None],
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            is_biased=True,
            keeps_going=True,
            noisy=noisy,
            truncated=truncated > 0 if truncates else None,
        )

    def _packed(self, params: SamplingParams | None) -> tuple[int, ...]:
        """A row's numbers, as the integers with their bits."""
        biased = params is not None and is_biased(params)
        numbers = *row_integers(params, self._vocab_size), biased, *row_floats(params)
        return struct.unpack(f"{_COLUMNS}q", struct.pack(_FORMAT, *numbers))
