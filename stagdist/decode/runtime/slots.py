"""Control messages of rank 0, and the state of the slots on every rank. No communication here."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Operation(IntEnum):
    """The next operation of all ranks."""

    STEP = 0
    """One token for every active slot."""
    ADMIT = 1
    """Prefill a prompt into a slot; the request follows in a second message."""
    REST = 2
    """Complete all hand-offs and wait for the next message."""
    STOP = 3
    """Shut down."""


@dataclass(frozen=True)
class Control:
    """One message of fixed size, applied by all ranks before the same operation.

    Attributes:
        slot: slot of an ADMIT.
        retired: slots to free before the operation.
    """

    operation: Operation
    slot: int = 0
    retired: tuple[int, ...] = ()

    def encode(self, num_slots: int) -> Tensor:
        """Shapes: int64 [2 + num_slots]."""
        flags = [int(slot in self.retired) for slot in range(num_slots)]
        return torch.tensor([int(self.operation), self.slot, *flags])

    @staticmethod
    def decode(message: Tensor) -> "Control":
        """Decode a message of `encode`."""
        operation, slot, *flags = message.tolist()
        return Control(Operation(operation), slot, tuple(i for i, flag in enumerate(flags) if flag))


class Slots:
    """Active slots and the position of each, the same on every rank."""

    def __init__(self, num_slots: int):
        self._positions: list[int | None] = [None] * num_slots

    @property
    def rows(self) -> int:
        """Number of rows of a step: up to the last active slot."""
        return max((slot + 1 for slot, position in enumerate(self._positions) if position is not None), default=0)

    def positions(self) -> list[int]:
        """Return the position of each row's next input token; 0 for unused rows."""
        return [position or 0 for position in self._positions[: self.rows]]

    def admit(self, slot: int, prompt_length: int) -> None:
        """Occupy a slot; its first new token has position `prompt_length`."""
        assert self._positions[slot] is None, f"slot {slot} is not free"
        self._positions[slot] = prompt_length

    def retire(self, slots: Sequence[int]) -> None:
        """Free slots."""
        for slot in slots:
            self._positions[slot] = None

    def advance(self) -> None:
        """Advance every active slot by one token."""
        self._positions = [None if position is None else position + 1 for position in self._positions]
