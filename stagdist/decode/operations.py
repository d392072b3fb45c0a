"""The loop that every rank runs: one operation after the other, as rank 0 decides, one message ahead.

Rank 0 sends what comes next while the present operation runs, so no rank ever waits for a decision. The price: what
ends a request by surprise takes effect one step later (the end of the document, a stop id) or, with several stages, two
(a stop string: text is made while the next step runs), and what is computed meanwhile is dropped. Limits are foreseen
and cost nothing.
"""

import gc
from collections.abc import Sequence
from typing import Protocol

import torch

from stagdist.decode.request import NUM_PARAM_FIELDS, Request, SamplingParams, decode_params, encode_params
from stagdist.decode.runtime.slots import Control, Operation
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampler import Choice
from stagdist.telemetry.pulse import Phase


class Owner(Protocol):
    """Whoever owns the requests, on rank 0."""

    def decide(self) -> Control:
        """What comes after the operation that is about to run."""

    def admission(self, slot: int) -> Request:
        """The request that `decide` put into a slot."""

    def took(self, control: Control, choice: Choice) -> None:
        """Take the tokens of an operation."""

    def host_work(self) -> None:
        """Handle text and requests while later stages compute."""

    def rest(self) -> None:
        """Nothing to do: return when there may be, or when the other ranks need a sign of life."""


class _Line:
    """How control reaches this rank."""

    def __init__(self, transport: Transport | None, num_slots: int, owner: Owner | None):
        self._transport, self._num_slots, self._owner = transport, num_slots, owner
        self._next: Control | None = None
        self._plain_step = Control(Operation.STEP)
        self._plain_message = self._plain_step.encode(num_slots)

    def post(self) -> None:
        """Decide (rank 0) or ask for the next message."""
        self._next = None if self._owner is None else self._owner.decide()
        if self._transport is None:
            return
        if self._next is None:
            message = torch.empty_like(self._plain_message)
        elif self._next.operation is Operation.STEP and not self._next.retired:
            message = self._plain_message  # nearly always: made once
        else:
            message = self._next.encode(self._num_slots)
        self._transport.post_control(message)

    def wait(self) -> Control:
        """The message."""
        message = None if self._transport is None else self._transport.wait_control()
        if self._next is not None:
            return self._next
        assert message is not None
        if torch.equal(message, self._plain_message):
            return self._plain_step
        return Control.decode(message)

    def admission(self, control: Control) -> tuple[Sequence[int], SamplingParams]:
        """Prompt and parameters of an ADMIT."""
        if self._owner is not None:
            request = self._owner.admission(control.slot)
            if self._transport is not None:
                payload = [*map(float, request.prompt_ids), *encode_params(request.params)]
                self._transport.share_admission(torch.tensor(payload, dtype=torch.float64))
            return request.prompt_ids, request.params
        assert self._transport is not None, "a rank without requests in a world of one"
        empty = torch.empty(control.prompt_length + NUM_PARAM_FIELDS, dtype=torch.float64)
        values = self._transport.share_admission(empty).tolist()
        prompt = [int(token) for token in values[: control.prompt_length]]
        return prompt, decode_params(values[control.prompt_length :])


@torch.inference_mode()
def operate(stage: Stage, transport: Transport | None, owner: Owner | None) -> None:
    """Run operations until rank 0 says stop.

    Args:
        owner: on rank 0; None on the others.

    Raises:
        TransportError: a peer is gone.
    """
    line = _Line(transport, stage.limits.num_slots, owner)
    # What exists now stays: a collection that looks at all of it would stop a step for tens of milliseconds.
    gc.freeze()
    try:
        _operate(line, stage, owner)
    finally:
        gc.unfreeze()


def _operate(line: _Line, stage: Stage, owner: Owner | None) -> None:
    host_work = None if owner is None else owner.host_work
    line.post()
    while True:
        stage.pulse.beat(Phase.RECEIVE)
        control = line.wait()
        stage.retire(control.retired)
        if control.operation in (Operation.REST, Operation.STOP):
            stage.rest()
            if control.operation is Operation.STOP:
                return
            if owner is not None:
                owner.rest()
            line.post()
            continue
        line.post()
        if control.operation is Operation.ADMIT:
            choice = stage.prefill(control.slot, *line.admission(control), host_work)
        else:
            choice = stage.step(host_work)
        if owner is not None:
            owner.took(control, choice)
