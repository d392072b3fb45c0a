"""Hand-offs between sections: which outputs of the previous section each row uses as memory.

The first hand-offs of a request are the last rows of its prompt.
"""

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device


class HandOffBuffers:
    """Hand-offs from the stage before: one buffer for each step of the lag and one being filled.

    Args:
        hidden_size: H.
    """

    def __init__(self, lag: int, num_slots: int, hidden_size: int, device: Device):
        self._lag = lag
        self._buffers = torch.zeros(lag + 1, num_slots, 1, hidden_size, dtype=device.dtype, device=device.name)
        self._tails: dict[int, tuple[int, Tensor]] = {}  # first decode step and end of the prompt, by slot

    def of_step(self, rows: int, step: int) -> Tensor:
        """Return the buffer of what the stage before sends in `step`. Shapes: [rows, 1, H]."""
        return self._buffers[step % len(self._buffers), :rows]

    def fill(self, slot: int, first_step: int, tail: Tensor) -> None:
        """Keep the end of a prompt for the first `lag` steps of its request. Shapes: tail [lag, H]."""
        self._tails[slot] = (first_step, tail)

    def oldest(self, rows: int, step: int) -> Tensor:
        """Return the new memory of the rows in `step`: what was sent `lag` steps ago, if anything, and ends of prompts.

        Shapes: [rows, 1, H].
        """
        memory = self.of_step(rows, step - self._lag)
        for slot, (first_step, tail) in list(self._tails.items()):
            if step - first_step >= self._lag:
                del self._tails[slot]
            elif slot < rows:
                memory[slot, 0] = tail[step - first_step]
        return memory


class HandOffRegister:
    """Hand-offs that arrive in the step that sends them: a shift register [lag, slots, H] at a fixed address."""

    def __init__(self, lag: int, num_slots: int, hidden_size: int, device: Device):
        self._register = torch.zeros(lag, num_slots, hidden_size, dtype=device.dtype, device=device.name)

    def fill(self, slot: int, tail: Tensor) -> None:
        """Keep the end of a prompt. Shapes: tail [lag, H]."""
        self._register[:, slot] = tail

    def oldest(self, rows: int) -> Tensor:
        """Return the new memory of the rows in this step. Shapes: [rows, 1, H]."""
        return self._register[0, :rows, None]

    def push(self, outputs: Tensor) -> None:
        """Add the outputs of this step, after all reads of `oldest`. Shapes: [rows, H]."""
        if len(self._register) > 1:
            self._register[:-1] = self._register[1:].clone()
        self._register[-1, : len(outputs)] = outputs


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
