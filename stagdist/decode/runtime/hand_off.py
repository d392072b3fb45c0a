"""The output of one section on its way to the next: which rows of which step a section may look at now.

A row that has just been admitted has no earlier step; its first hand-offs are the last rows of its prompt.
"""

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device


class Tails:
    """Last `lag` outputs of each prompt, until steps have taken their place."""

    def __init__(self, lag: int):
        self._lag = lag
        self._open: dict[int, tuple[int, Tensor]] = {}

    def fill(self, slot: int, first_step: int, tail: Tensor) -> None:
        """Keep the end of a prompt. Shapes: tail [lag, H]; `first_step` is the request's first decode step."""
        self._open[slot] = (first_step, tail)

    def merge(self, rows: int, step: int, carried: Tensor | None) -> Tensor:
        """What the rows look at newly in `step`.

        Args:
            rows: number of rows.
            carried: [at least the rows that are older, H], sent `lag` steps ago; None when nothing was.

        Returns: [rows, H].
        """
        for slot in [slot for slot, (first, _) in self._open.items() if step - first >= self._lag]:
            del self._open[slot]
        young = [slot for slot in self._open if slot < rows]
        if not young and carried is not None and carried.shape[0] >= rows:
            return carried[:rows]
        source = next(iter(self._open.values()))[1] if carried is None else carried
        merged = torch.zeros(rows, source.shape[1], dtype=source.dtype, device=source.device)
        if carried is not None:
            known = min(rows, carried.shape[0])
            merged[:known] = carried[:known]
        for slot in young:
            first, tail = self._open[slot]
            merged[slot] = tail[step - first]
        return merged


class LocalHandOff:
    """Between two sections of one process: a shift register, the same memory in every step (a graph can hold it).

    Shapes: [lag, slots, H].
    """

    def __init__(self, lag: int, num_slots: int, hidden_size: int, device: Device):
        self.register = torch.zeros(lag, num_slots, hidden_size, dtype=device.dtype, device=device.name)

    def fill(self, slot: int, tail: Tensor) -> None:
        """Keep the end of a prompt. Shapes: tail [lag, H]."""
        self.register[:, slot] = tail

    def oldest(self, rows: int) -> Tensor:
        """What the rows look at newly in this step. Shapes: [rows, H]."""
        return self.register[0, :rows]

    def push(self, outputs: Tensor) -> None:
        """Take the outputs of this step, after everybody has read `oldest`. Shapes: [rows, H]."""
        if len(self.register) > 1:
            self.register[:-1] = self.register[1:].clone()
        self.register[-1, : len(outputs)] = outputs


class PromptMemory:
    """Shifts the outputs of a prompt's chunks, so that each position sees the one `lag` before it.

    Positions before the first hold zeros; the null vector takes their place.
    """

    def __init__(self, lag: int):
        self._lag = lag
        self._tail: Tensor | None = None

    def shift(self, outputs: Tensor) -> Tensor:
        """Take a chunk's outputs, give what its positions look at. Shapes: [1, S, H] -> [1, S, H]."""
        if self._lag == 0:
            return outputs
        if self._tail is None:
            self._tail = outputs.new_zeros(1, self._lag, outputs.shape[2])
        joined = torch.cat((self._tail, outputs), dim=1)
        self._tail = joined[:, -self._lag :]
        return joined[:, : outputs.shape[1]]

    @property
    def tail(self) -> Tensor:
        """The last outputs, not yet looked at by any position. Shapes: [lag, H]."""
        assert self._tail is not None, "the tail of a prompt before its first chunk"
        return self._tail[0]
