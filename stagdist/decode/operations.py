"""The operation loop of every rank. Rank 0 decides each operation while the previous one runs.

No rank waits for a decision, but an unforeseen end of a request takes effect late: one step after an end-of-document
token or a stop id and, with several stages, two after a stop string, because text is decoded during the next step. The
additional tokens are dropped. Length limits are known in advance.
"""

import gc
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from stagdist.decode.request import Request
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampler import Choice
from stagdist.telemetry.pulse import Phase


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


class Owner(Protocol):
    """The object that owns the requests on rank 0."""

    def decide(self) -> Control:
        """Decide the operation after the one that is about to run."""

    def admission(self, slot: int) -> Request:
        """Return the request that `decide` assigned to a slot."""

    def took(self, control: Control, choice: Choice) -> None:
        """Process the tokens of an operation."""

    def host_work(self) -> None:
        """Handle text and requests while later stages compute."""

    def rest(self) -> None:
        """Wait for work; return early if the other ranks need a heartbeat."""


class _ControlChannel:
    """Gives this rank the decisions of rank 0."""

    def __init__(self, transport: Transport | None, num_slots: int, owner: Owner | None):
        self._transport, self._num_slots, self._owner = transport, num_slots, owner
        self._next: Control | None = None
        self._plain_step = Control(Operation.STEP)
        self._plain_message = self._plain_step.encode(num_slots)

    def post(self) -> None:
        """Decide and send the next operation (rank 0), or post its receive."""
        self._next = None if self._owner is None else self._owner.decide()
        if self._transport is None:
            return
        if self._next is None:
            message = torch.empty_like(self._plain_message)
        elif self._next.operation is Operation.STEP and not self._next.retired:
            message = self._plain_message  # the usual case, encoded once
        else:
            message = self._next.encode(self._num_slots)
        self._transport.post_control(message)

    def wait(self) -> Control:
        """Wait for the next operation."""
        message = None if self._transport is None else self._transport.wait_control()
        if self._next is not None:
            return self._next
        assert message is not None
        if torch.equal(message, self._plain_message):
            return self._plain_step
        return Control.decode(message)

    def admission(self, slot: int) -> Request:
        """Return the request of an ADMIT."""
        request = None if self._owner is None else self._owner.admission(slot)
        if self._transport is not None:
            return self._transport.share_admission(request)
        assert request is not None, "a single process must own the requests"
        return request


@torch.inference_mode()
def operate(stage: Stage, transport: Transport | None, owner: Owner | None) -> None:
    """Run operations until rank 0 stops.

    Args:
        owner: on rank 0; None on the others.

    Raises:
        TransportError: a peer has ended.
    """
    channel = _ControlChannel(transport, stage.limits.num_slots, owner)
    # Keep existing objects out of garbage collection, which would pause a step for tens of milliseconds.
    gc.freeze()
    try:
        _operate(channel, stage, owner)
    finally:
        gc.unfreeze()


def _operate(channel: _ControlChannel, stage: Stage, owner: Owner | None) -> None:
    host_work = None if owner is None else owner.host_work
    channel.post()
    while True:
        stage.pulse.beat(Phase.RECEIVE)
        control = channel.wait()
        stage.retire(control.retired)
        if control.operation in (Operation.REST, Operation.STOP):
            stage.rest()
            if control.operation is Operation.STOP:
                return
            if owner is not None:
                owner.rest()
            channel.post()
            continue
        channel.post()
        if control.operation is Operation.ADMIT:
            request = channel.admission(control.slot)
            choice = stage.prefill(control.slot, request.prompt_ids, request.params, host_work)
        else:
            choice = stage.step(host_work)
        if owner is not None:
            owner.took(control, choice)
