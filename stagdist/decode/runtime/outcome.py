"""What an operation has chosen, on the device and on its way to the host."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampling.sampler import Choice
from stagdist.parallel.device import on_cuda
from stagdist.parallel.link import record_event

IN_FLIGHT = 2
"""Outcomes whose copies exist at a time: one that is read, and that of the operation launched since."""


@dataclass(frozen=True)
class Outcome:
    """What an operation has chosen, the same on every rank.

    Attributes:
        step: tokens of the step, one row for each of rows 0 to the last slot that decodes; None without a step. Rows of
            other slots have no meaning. Valid until the next operation.
        first: first token of the prompt whose last chunk left the last stage, one row; None without such a prompt.
        scores: tokens that follow the positions of a chunk, and their log-probabilities, if its request asks for them.
    """

    step: Choice | None = None
    first: Choice | None = None
    scores: Choice | None = None


@dataclass(frozen=True)
class HostCopy:
    """An outcome on its way to the host.

    Attributes:
        event: behind the copy; None if the copy is complete.
        step: its step, for error messages.
    """

    outcome: Outcome
    event: torch.cuda.Event | None
    step: int
    transport: Transport | None

    def wait(self) -> Outcome:
        """Wait for the copy.

        Raises:
            TransportError: a peer has ended or does not answer.
        """
        if self.event is not None and self.transport is not None:
            self.transport.wait_for_device(f"while it waited for the token of step {self.step}", self.event)
        elif self.event is not None:
            self.event.synchronize()
        return self.outcome


class HostBuffers:
    """A ring of buffers for tokens in memory of the host, pinned where they come from a GPU."""

    def __init__(self, num_slots: int, device: Device, transport: Transport | None):
        self._device, self._transport = device, transport
        buffers = [device.host_buffer([num_slots], torch.int64) for _ in range(2 * IN_FLIGHT)]
        self._ring = itertools.cycle(buffers)  # two for each outcome: `step` and `first`

    def copy(self, outcome: Outcome, step: int) -> HostCopy:
        """Begin to copy an outcome. The host does not wait, and later operations may overwrite the original."""
        scores = outcome.scores and Choice(outcome.scores.tokens, self._to_host(outcome.scores.logprobs))
        copied = Outcome(self._choice(outcome.step), self._choice(outcome.first), scores)
        event = None
        if self._transport is not None:
            event = self._transport.mark()
        elif on_cuda(self._device.name):
            event = record_event(self._device.name)
        return HostCopy(copied, event, step, self._transport)

    def _choice(self, choice: Choice | None) -> Choice | None:
        if choice is None:
            return None
        tokens = next(self._ring)[: len(choice.tokens)].copy_(choice.tokens, non_blocking=True)
        return Choice(tokens, self._to_host(choice.logprobs), self._to_host(choice.margins))

    def _to_host(self, tensor: Tensor | None) -> Tensor | None:
        """Copy what no later operation overwrites; a CPU tensor is returned unchanged."""
        if tensor is None or not tensor.is_cuda:
            return tensor
        return self._device.host_buffer(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
