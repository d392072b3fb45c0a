"""Changes logits before tokens are chosen: allowed tokens, biases and penalties of each slot's request.

The order is vLLM's: tokens that are not allowed or would end the output too early, bias, repetition penalty, frequency
and presence penalty. Every token is changed by itself, so a slice of the vocabulary needs nothing of the others.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.sampling_plan import SamplingPlan, is_biased

_MINUS_INF = float("-inf")


class LogitsProcessor:
    """The requests' state on one rank, which holds a slice of the vocabulary.

    Tensors of all slots are made for the first request that needs them, or at once where steps are captured. A row may
    see what its slot's last request left behind only where that changes nothing.

    Args:
        first_token: id of the first token of the slice.
        size: tokens of the slice, possibly 0.
        captured: captured steps read the tensors, which therefore stay in place from the start.
    """

    def __init__(self, num_slots: int, first_token: int, size: int, device: Device, captured: bool = False) -> None:
        self._num_slots, self._first, self._size, self._device = num_slots, first_token, size, device
        self._seen: Tensor | None = None  # bool: in the prompt or generated
        self._counts: Tensor | None = None  # int32: how often it was generated
        self._bias: Tensor | None = None  # float32; minus infinity where a token is not allowed
        self._ends: Tensor | None = None  # bool: would end the output
        self._may_end = torch.zeros(num_slots, dtype=torch.int64, device=device.name)  # from this position on
        if captured:
            self._seen, self._counts = self._table(None, torch.bool), self._table(None, torch.int32)
            self._bias, self._ends = self._table(None, torch.float32), self._table(None, torch.bool)

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Prepare a slot for a request."""
        if params.repetition_penalty != 1:
            self._seen = self._table(self._seen, torch.bool)
            self._set(self._seen[slot].zero_(), prompt_ids, True)
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            self._counts = self._table(self._counts, torch.int32)
            self._counts[slot].zero_()
        if is_biased(params):
            self._bias = self._table(self._bias, torch.float32)
            self._set_bias(self._bias[slot], params)
        elif self._bias is not None:
            self._bias[slot].zero_()
        if params.min_tokens:
            self._ends = self._table(self._ends, torch.bool)
            self._set(self._ends[slot].zero_(), params.stop_token_ids, True)
        if self._ends is not None:
            self._may_end[slot] = len(prompt_ids) + params.min_tokens

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all slots by their names in `SamplingTables`; all exist where captured."""
        tables = {"ends": self._ends, "bias": self._bias, "seen": self._seen, "counts": self._counts}
        return {"may_end": self._may_end, **{name: table for name, table in tables.items() if table is not None}}

    def apply(self, raw: Tensor, plan: SamplingPlan, positions: Tensor) -> Tensor:
        """The changed logits of a step's rows.

        Args:
            positions: of the tokens to be chosen.

        Shapes: raw and result float64 [B, V]; positions int64 [B].
        """
        scores = raw
        if plan.keeps_going:
            assert self._ends is not None
            early = (positions < self._may_end[plan.slots])[:, None]
            scores = scores.masked_fill(self._ends[plan.slots] & early, _MINUS_INF)
        if plan.is_biased:
            assert self._bias is not None
            scores = scores + self._bias[plan.slots]
        if plan.repetition is not None:
            assert self._seen is not None
            changed = torch.where(scores > 0, scores / plan.repetition, scores * plan.repetition)
            scores = torch.where(self._seen[plan.slots], changed, scores)
        if plan.presence is not None and plan.frequency is not None:
            assert self._counts is not None
            counts = self._counts[plan.slots]
            scores = scores - plan.frequency * counts - plan.presence * (counts > 0)
        return scores

    def take(self, tokens: Tensor, plan: SamplingPlan) -> None:
        """Remember the tokens that were chosen for a step's rows. Shapes: int64 [B]."""
        if self._size == 0 or (plan.repetition is None and plan.presence is None):
            return
        local = tokens - self._first
        place, mine = (plan.slots, local.clamp(0, self._size - 1)), (local >= 0) & (local < self._size)
        if plan.repetition is not None and self._seen is not None:
            self._seen[place] = self._seen[place] | mine
        if plan.presence is not None and self._counts is not None:
            self._counts[place] += mine

    def _table(self, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        """A row for each slot. Shapes: [slots, V]."""
        if table is not None:
            return table
        return torch.zeros(self._num_slots, self._size, dtype=dtype, device=self._device.name)

    def _set(self, row: Tensor, ids: Iterable[int], value: bool | float) -> None:
        """Fill the entries of the ids that belong to the slice."""
        mine = sorted({token - self._first for token in ids if 0 <= token - self._first < self._size})
        if mine:
            row.index_fill_(0, self._device.upload(mine, torch.int64), value)

    def _set_bias(self, row: Tensor, params: SamplingParams) -> None:
        allowed = params.allowed_token_ids
        row.fill_(0.0 if allowed is None else _MINUS_INF)
        self._set(row, allowed or (), 0.0)
        mine = {token - self._first: bias for token, bias in params.logit_bias}
        mine = {place: bias for place, bias in mine.items() if 0 <= place < self._size}
        if mine:
            places = self._device.upload(list(mine), torch.int64)
            row.index_add_(0, places, self._device.upload(list(mine.values()), torch.float32))
