"""Hand-off between neighbouring stages while training: nobody waits for a send, receives are posted early.

DeepSpeed's own hand-off blocks in every send until the peer asks for the data, so that each transfer, and each
moment in which one stage is late, is waited for by both. Here a stage goes on computing; its data leave as soon as
they exist and arrive in a buffer that the peer posted one micro-batch ahead.

Every directed edge between two stages has a communicator of its own. Data of one edge arrive in the order in which
they are sent, and no edge can hold up another: with nccl the operations of one communicator run strictly in order.
"""

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor

from stagdist.config import RunConfig
from stagdist.errors import TransportError
from stagdist.parallel.grid import Grid
from stagdist.training.pipeline import Carry

SENDS_IN_FLIGHT = 2
"""Hand-offs of one edge that may be on their way before the sender waits for the oldest."""


@dataclass(frozen=True)
class TensorKind:
    """What one tensor of a hand-off looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def hand_off_kinds(config: RunConfig, dtype: torch.dtype) -> list[TensorKind]:
    """What a stage hands to the next: the float tensor, and the tokens where later sections need them.

    Shapes: [B, S, H], with combined sections [2, B, S, H]; tokens int64 [B, S].
    """
    batch = (config.training.micro_batch_size, config.sequence_length)
    stack = (2,) if config.model.combine_sections else ()
    carried = TensorKind((*stack, *batch, config.model.hidden_size), dtype)
    return [carried, TensorKind(batch, torch.int64)] if config.model.staggered else [carried]


@dataclass(frozen=True)
class Edge:
    """One direction between this stage and a neighbour.

    Attributes:
        name: for error messages.
        peer: global rank of the neighbour.
        group: communicator of this edge alone.
    """

    name: str
    peer: int
    group: dist.ProcessGroup

    def failed(self, error: Exception) -> TransportError:
        """The error to raise when a transfer failed."""
        return TransportError(
            f"{self.name}: the transfer failed; look for the first error of rank {self.peer}, or raise "
            f"parallel.timeout_s if that rank is merely slow"
        )


class Outbox:
    """Sends of one edge."""

    def __init__(self, edge: Edge, kinds: list[TensorKind]):
        self._edge, self._kinds = edge, kinds
        # The tensors are kept with the work: they must live until they have left.
        self._pending: deque[list[tuple[dist.Work, Tensor]]] = deque()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Start one hand-off; waits only for the one before the last.

        Raises:
            TransportError: a tensor is not what the peer expects, or an earlier transfer failed.
        """
        found = [TensorKind(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if found != self._kinds:
            raise TransportError(
                f"{self._edge.name}: ready to send {', '.join(map(str, found))}, but the configuration says "
                f"{', '.join(map(str, self._kinds))}; batches must have the shape training.micro_batch_size x "
                "data.sequence_length"
            )
        try:
            self._pending.append([self._start(tensor.detach().contiguous()) for tensor in tensors])
        except RuntimeError as error:
            raise self._edge.failed(error) from error
        while len(self._pending) > SENDS_IN_FLIGHT:
            self._wait_oldest()

    def finish(self) -> None:
        """Wait until everything has left."""
        while self._pending:
            self._wait_oldest()

    def _start(self, tensor: Tensor) -> tuple[dist.Work, Tensor]:
        work = dist.isend(tensor, self._edge.peer, group=self._edge.group)
        assert work is not None, "this rank is a member of the edge's group"
        return work, tensor

    def _wait_oldest(self) -> None:
        for work, _ in self._pending.popleft():
            try:
                work.wait()
            except RuntimeError as error:
                raise self._edge.failed(error) from error


class Inbox:
    """Receives of one edge; while hand-offs are due, one receive is always posted."""

    def __init__(self, edge: Edge, kinds: list[TensorKind], device: torch.device | str):
        self._edge, self._kinds, self._device = edge, kinds, device
        self._due = 0
        self._posted: list[tuple[dist.Work, Tensor]] = []

    def expect(self, hand_offs: int) -> None:
        """Say how many hand-offs the schedule that begins now holds."""
        self._due = hand_offs
        self._post()

    def take(self) -> list[Tensor]:
        """The tensors of the next hand-off, in buffers of their own.

        Raises:
            TransportError: the transfer failed.
        """
        received = self._posted
        try:
            for work, _ in received:
                work.wait()
        except RuntimeError as error:
            raise self._edge.failed(error) from error
        self._post()
        return [tensor for _, tensor in received]

    def _post(self) -> None:
        self._posted = []
        if self._due:
            self._due -= 1
            self._posted = [self._start(kind) for kind in self._kinds]

    def _start(self, kind: TensorKind) -> tuple[dist.Work, Tensor]:
        buffer = torch.empty(kind.shape, dtype=kind.dtype, device=self._device)
        work = dist.irecv(buffer, self._edge.peer, group=self._edge.group)
        assert work is not None, "this rank is a member of the edge's group"
        return work, buffer


class Exchange:
    """The boxes of one rank; None where the stage has no such neighbour.

    All ranks build it at the same time.

    Attributes:
        activations_in: memory and tokens from the stage before.
        activations_out: the same to the stage after.
        gradients_in: gradient of what was sent, from the stage after.
        gradients_out: gradient of what was received, to the stage before.
    """

    def __init__(self, grid: Grid, kinds: list[TensorKind], device: torch.device | str, timeout_s: float):
        self.activations_in: Inbox | None = None
        self.activations_out: Outbox | None = None
        self.gradients_in: Inbox | None = None
        self.gradients_out: Outbox | None = None
        gradients = kinds[:1]
        for ranks in grid.pipe_groups():
            for stage, (below, above) in enumerate(itertools.pairwise(ranks)):
                # Every rank makes every group, in one order, as torch wants it.
                forward, backward = (_new_pair(below, above, device, timeout_s) for _ in range(2))
                down = Edge(f"activations from stage {stage} to stage {stage + 1}", above, forward)
                up = Edge(f"gradients from stage {stage + 1} to stage {stage}", below, backward)
                if dist.get_rank() == below:
                    self.activations_out = Outbox(down, kinds)
                    self.gradients_in = Inbox(replace(up, peer=above), gradients, device)
                elif dist.get_rank() == above:
                    self.activations_in = Inbox(replace(down, peer=below), kinds, device)
                    self.gradients_out = Outbox(up, gradients)

    def begin(self, instructions: Sequence[schedule.PipeInstruction]) -> None:
        """Open a schedule: post the first receives and remember how many will follow."""
        kinds = Counter(type(instruction) for instruction in instructions)
        for box, kind in ((self.activations_in, schedule.RecvActivation), (self.gradients_in, schedule.RecvGrad)):
            if box is not None:
                box.expect(kinds[kind])

    def finish(self) -> None:
        """Close a schedule: everything has left, errors have surfaced."""
        for box in (self.activations_out, self.gradients_out):
            if box is not None:
                box.finish()

    def send_activations(self, outputs: Carry) -> None:
        """Hand a stage's outputs to the stage after."""
        assert self.activations_out is not None, "the last stage has nobody to hand its outputs to"
        self.activations_out.send(as_tuple(outputs))

    def receive_activations(self) -> Carry:
        """Inputs from the stage before: leaves, the float one asking for its gradient."""
        assert self.activations_in is not None, "the first stage has nobody to receive from"
        carried, *tokens = self.activations_in.take()
        carried.requires_grad_()
        return (carried, tokens[0]) if tokens else carried

    def send_gradients(self, inputs: Carry) -> None:
        """Hand the gradient of what was received back to the stage before."""
        assert self.gradients_out is not None, "the first stage has nobody to hand gradients to"
        gradient = as_tuple(inputs)[0].grad
        assert gradient is not None, "the backward pass left no gradient of the stage's inputs"
        self.gradients_out.send((gradient,))

    def receive_gradients(self) -> Tensor:
        """Gradient of the float output, from the stage after."""
        assert self.gradients_in is not None, "the last stage has nobody to receive gradients from"
        return self.gradients_in.take()[0]


def as_tuple(carry: Carry) -> tuple[Tensor, ...]:
    """What travels between stages, as a tuple with the float tensor first."""
    return carry if isinstance(carry, tuple) else (carry,)


def _new_pair(below: int, above: int, device: torch.device | str, timeout_s: float) -> dist.ProcessGroup:
    """A communicator of two neighbours; its members use it once, because the first use blocks."""
    group = dist.new_group([below, above], timeout=timedelta(seconds=timeout_s))
    probe = torch.zeros(1, device=device)
    if dist.get_rank() == below:
        dist.send(probe, above, group=group)
    elif dist.get_rank() == above:
        dist.recv(probe, below, group=group)
    return group
