"""Hand-offs between sections: which outputs of the previous section each row uses as memory.

The first hand-offs of a request are the last rows of its prompt.
"""

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device


class Tails:
    """The last `lag` outputs of each prompt, used in the first `lag` steps of its request."""

    def __init__(self, lag: int):
        self._lag = lag
        self._open: dict[int, tuple[int, Tensor]] = {}

    def fill(self, slot: int, first_step: int, tail: Tensor) -> None:
        """Keep the end of a prompt. Shapes: tail [lag, H]; `first_step` is the request's first decode step."""
        self._open[slot] = (first_step, tail)

    def merge(self, rows: int, step: int, carried: Tensor | None) -> Tensor:
        """Return the new memory of the rows in `step`.

        Args:
            rows: number of rows.
            carried: [at least the older rows, H], sent `lag` steps ago; None if nothing was sent.

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
    """Hand-off inside a process: a shift register [lag, slots, H] at a fixed address, for CUDA graphs."""

    def __init__(self, lag: int, num_slots: int, hidden_size: int, device: Device):
        self.register = torch.zeros(lag, num_slots, hidden_size, dtype=device.dtype, device=device.name)

    def fill(self, slot: int, tail: Tensor) -> None:
        """Keep the end of a prompt. Shapes: tail [lag, H]."""
        self.register[:, slot] = tail

    def oldest(self, rows: int) -> Tensor:
        """Return the new memory of the rows in this step. Shapes: [rows, H]."""
        return self.register[0, :rows]

    def push(self, outputs: Tensor) -> None:
        """Add the outputs of this step, after all reads of `oldest`. Shapes: [rows, H]."""
        if len(self.register) > 1:
            self.register[:-1] = self.register[1:].clone()
        self.register[-1, : len(outputs)] = outputs


class PromptMemory:
    """Shifts the outputs of a prompt's chunks by `lag` positions; the first `lag` positions hold zeros."""

    def __init__(self, lag: int):
        self._lag = lag
        self._tail: Tensor | None = None

    def shift(self, outputs: Tensor) -> Tensor:
        """Add a chunk's outputs and return the memory of its positions. Shapes: [1, S, H] -> [1, S, H]."""
        if self._lag == 0:
            return outputs
        if self._tail is None:
            self._tail = outputs.new_zeros(1, self._lag, outputs.shape[2])
        joined = torch.cat((self._tail, outputs), dim=1)
        self._tail = joined[:, -self._lag :]
        return joined[:, : outputs.shape[1]]

    @property
    def tail(self) -> Tensor:
        """The last outputs, which no position has used yet. Shapes: [lag, H]."""
        assert self._tail is not None, "the tail of a prompt before its first chunk"
        return self._tail[0]
