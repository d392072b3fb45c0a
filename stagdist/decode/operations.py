"""The operation loop of every rank. Rank 0 decides each operation while the previous one runs.

No rank waits for a decision, but an unforeseen end of a request takes effect late: one step after an end-of-document
token or a stop id and, with several stages, two after a stop string, because text is decoded during the next step. On a
GPU the host launches a step before it reads the tokens of the one before, and all of this is one step later. The
additional tokens are dropped. Length limits are known in advance.
"""

import gc
from collections import deque
from typing import Protocol

import torch

from stagdist.decode.control import Control, Operation
from stagdist.decode.engine_stats import StageReport
from stagdist.decode.runtime.outcome import HostCopy, Outcome
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.telemetry.pulse import Phase


class Owner(Protocol):
    """The object that owns the requests on rank 0."""

    def decide(self) -> Control:
        """Decide the operation after the one that is about to run."""

    def took(self, outcome: Outcome) -> None:
        """Process the tokens of an operation."""

    def host_work(self) -> None:
        """Handle text and requests while later stages compute."""

    def rest(self) -> None:
        """Wait for work; return early if the other ranks need a heartbeat."""

    def take_reports(self, reports: tuple[StageReport, ...]) -> None:
        """Keep the reports of all ranks, which have just shown that they are alive."""


class _ControlChannel:
    """Gives this rank the decisions of rank 0."""

    def __init__(self, transport: Transport | None, num_slots: int, owner: Owner | None):
        self._transport, self._num_slots, self._owner = transport, num_slots, owner
        self._next: Control | None = None
        self._plain_step = Control(Operation.RUN, step=True)
        self._plain_message, _ = self._plain_step.encode(num_slots)

    def post(self) -> None:
        """Decide and send the next operation (rank 0), or post its receive."""
        self._next = None if self._owner is None else self._owner.decide()
        if self._transport is None:
            return
        if self._next is None:
            self._transport.post_control(torch.empty_like(self._plain_message))
        elif self._next == self._plain_step:
            self._transport.post_control(self._plain_message)  # the usual case, encoded once
        else:
            self._transport.post_control(*self._next.encode(self._num_slots))

    def wait(self) -> Control:
        """Wait for the next operation."""
        message = None if self._transport is None else self._transport.wait_control()
        if self._next is not None:
            return self._next
        assert message is not None and self._transport is not None
        if torch.equal(message, self._plain_message):
            return self._plain_step
        return Control.decode(message, self._transport.receive_payload(Control.payload_size(message)))


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
    copies: deque[HostCopy] = deque()  # of outcomes that the owner has not seen

    def take(unseen: int) -> None:
        while owner is not None and len(copies) > unseen:
            owner.took(stage.on_host(copies.popleft()))

    channel.post()
    while True:
        stage.pulse.beat(Phase.RECEIVE)
        control = channel.wait()
        stage.retire(control.retired)
        if control.operation is Operation.RUN:
            channel.post()
            outcome = stage.run(control.chunk, control.admission, step=control.step, host_work=host_work)
            if owner is not None:
                copies.append(stage.to_host(outcome))
                take(unseen=int(stage.runs_ahead))
            continue
        if control.operation is Operation.REPORT:
            channel.post()
            _report(stage, owner)
            continue
        take(unseen=0)
        stage.rest()
        if control.operation is Operation.STOP:
            return
        _report(stage, owner)
        if owner is not None:
            owner.rest()
        channel.post()


def _report(stage: Stage, owner: Owner | None) -> None:
    reports = stage.reports()
    if owner is not None:
        owner.take_reports(reports)
