"""What an operation has chosen, on the device and on its way to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampling.sampler import Choice
from stagdist.parallel.device import on_cuda
from stagdist.parallel.link import record_event


@dataclass(frozen=True)
class Outcome:
    """What an operation has chosen, the same on every rank.

    Attributes:
        step: tokens of the step, one row for each of rows 0 to the last slot that decodes; None without a step.
        first: first token of the prompt whose last chunk left the last stage, one row; None without such a prompt.
        scores: tokens that follow the positions of a chunk, and their log-probabilities, if its request asks for them.
    """

    step: Choice | None = None
    first: Choice | None = None
    scores: Choice | None = None


class HostCopy:
    """An outcome on its way to pinned memory of the host, with an event behind it. On a CPU it is there already."""

    def __init__(self, outcome: Outcome, transport: Transport | None, device: str):
        self._transport = transport
        self._outcome = Outcome(*(_copied(choice) for choice in (outcome.step, outcome.first, outcome.scores)))
        self._event: torch.cuda.Event | None = None
        if transport is not None:
            self._event = transport.mark()
        elif on_cuda(device):
            self._event = record_event(device)

    def wait(self) -> Outcome:
        """Wait until it is there.

        Raises:
            TransportError: a peer has ended or does not answer.
        """
        if self._event is not None:
            if self._transport is not None:
                self._transport.wait_for_device("while it waited for the token", self._event)
            else:
                self._event.synchronize()
        return self._outcome


def _copied(choice: Choice | None) -> Choice | None:
    if choice is None:
        return None
    tokens = _to_host(choice.tokens)
    assert tokens is not None
    return Choice(tokens, _to_host(choice.logprobs), _to_host(choice.margins))


def _to_host(tensor: Tensor | None) -> Tensor | None:
    """Copy to pinned memory without waiting. The next step may overwrite the original."""
    if tensor is None:
        return None
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
