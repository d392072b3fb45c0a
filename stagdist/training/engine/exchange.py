"""Hand-off between neighboring stages during training: no stage waits for a send.

DeepSpeed's own hand-off blocks in every send until the peer asks for the data, so both stages wait for each transfer
and for each delay of the other. Here a stage continues to compute. Its data leave as soon as they exist and arrive in
a buffer that the peer has ready one micro-batch ahead (`stagdist/parallel/link.py` describes when the receive is
posted).
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor

from stagdist.errors import TransportError
from stagdist.parallel.grid import Grid
from stagdist.parallel.link import DeviceWaits, Edge, Inbox, Outbox, PeerWatch, Rules, new_group, rules_of
from stagdist.training.engine.pipeline import HandOff

MICRO_BATCH = "micro-batch"
SENDS_IN_FLIGHT = 2
"""Hand-offs of one edge that may be in transit before the sender waits for the oldest."""


class Arrivals:
    """The incoming hand-offs of one schedule. Each has its own buffer, and one is always expected ahead.

    Args:
        expected: shapes and dtypes of a hand-off.
    """

    def __init__(self, inbox: Inbox, expected: HandOff, device: torch.device | str):
        self._inbox, self._shapes, self._device = inbox, expected.to_tuple(), device
        self._expected = self._taken = self._due = 0

    def expect(self, hand_offs: int) -> None:
        """Set the number of hand-offs in the schedule that begins now."""
        self._expected = self._taken = 0
        self._due = hand_offs
        self._expect_next()

    def take(self) -> HandOff:
        """The next hand-off.

        Raises:
            TransportError: the transfer failed.
        """
        tensors = self._inbox.take((MICRO_BATCH, self._taken))
        self._taken += 1
        self._expect_next()
        return HandOff(*tensors)

    def _expect_next(self) -> None:
        if self._expected < self._due:
            buffers = [torch.empty(shape.shape, dtype=shape.dtype, device=self._device) for shape in self._shapes]
            self._inbox.expect((MICRO_BATCH, self._expected), *buffers)
            self._expected += 1


class Departures:
    """The outgoing hand-offs, checked against what the peer expects.

    Args:
        name: of the edge, for errors.
        expected: shapes and dtypes of a hand-off.
    """

    def __init__(self, name: str, outbox: Outbox, expected: HandOff):
        self._name, self._outbox, self._expected = name, outbox, _described(expected)

    def send(self, hand_off: HandOff) -> None:
        """Start to send one hand-off; waits only for the one before the last.

        Raises:
            TransportError: a tensor is not what the peer expects, or an earlier transfer failed.
        """
        found = _described(hand_off)
        if found != self._expected:
            raise TransportError(
                f"{self._name}: ready to send {found}, but the configuration says {self._expected}; batches must have "
                "the shape training.micro_batch_size x data.sequence_length"
            )
        tensors = (tensor.detach().contiguous() for tensor in hand_off.to_tuple())
        self._outbox.send(*tensors, in_flight=SENDS_IN_FLIGHT)

    def finish(self) -> None:
        """Wait until everything is sent."""
        self._outbox.finish()


class Exchange:
    """The edges of one rank; None where the stage has no such neighbor.

    All ranks build it at the same time.

    Args:
        hand_off: shapes and dtypes of what a stage hands to the next.
        rules: of the backend; None takes those of the device's backend.

    Attributes:
        activations_in: memory and token ids from the stage before.
        activations_out: the same to the stage after.
        gradients_in: gradient of what was sent, from the stage after.
        gradients_out: gradient of what was received, to the stage before.
    """

    def __init__(
        self,
        grid: Grid,
        hand_off: HandOff,
        device: torch.device | str,
        timeout_s: float,
        *,
        rules: Rules | None = None,
    ):
        self.activations_in: Arrivals | None = None
        self.activations_out: Departures | None = None
        self.gradients_in: Arrivals | None = None
        self.gradients_out: Departures | None = None
        self.hand_off, self.rules = hand_off, rules_of(device) if rules is None else rules
        self._device, self._timeout_s = device, timeout_s
        watches = not self.rules.wait_blocks and dist.get_world_size() > 1
        self._watch = PeerWatch(_neighbors(grid), timeout_s) if watches else None
        errors = partial(_failed, "hand-offs and sums of this step")
        self._waits = DeviceWaits(self.rules, device, timeout_s, errors, self._watch)
        # torch requires that every rank makes every group, in the same order. Then neighbors connect.
        pairs = [pair for ranks in grid.pipe_groups() for pair in enumerate(itertools.pairwise(ranks))]
        made = [[new_group(ranks, self.rules, timeout_s) for _ in ("down", "up")] for _, ranks in pairs]
        for (stage, ranks), groups in zip(pairs, made, strict=True):
            if dist.get_rank() in ranks:
                self._open(stage, *ranks, *groups)

    def begin(self, instructions: Sequence[schedule.PipeInstruction]) -> None:
        """Begin a schedule: count the hand-offs that will arrive."""
        counts = Counter(type(instruction) for instruction in instructions)
        for arrivals, kind in ((self.activations_in, schedule.RecvActivation), (self.gradients_in, schedule.RecvGrad)):
            if arrivals is not None:
                arrivals.expect(counts[kind])

    def finish(self) -> None:
        """End a schedule: wait until everything is sent; errors are raised here at the latest."""
        for departures in (self.activations_out, self.gradients_out):
            if departures is not None:
                departures.finish()

    def wait_for_device(self, doing: str) -> None:
        """Wait until the device has done everything enqueued so far, with a time limit. Returns at once on gloo.

        Raises:
            TransportError: a neighbor has ended, or the time is up.
        """
        self._waits.wait(doing)

    def close(self) -> None:
        """End the watch of other ranks. All ranks call this at the same time."""
        if self._watch is not None:
            self._watch.close(self._timeout_s)

    def send_activations(self, outputs: HandOff) -> None:
        """Hand a stage's outputs to the stage after."""
        assert self.activations_out is not None, "the last stage has no stage to send its outputs to"
        self.activations_out.send(outputs)

    def receive_activations(self) -> HandOff:
        """Inputs from the stage before: leaves of the graph. The memory requires a gradient."""
        assert self.activations_in is not None, "the first stage has no stage to receive from"
        inputs = self.activations_in.take()
        inputs.memory.requires_grad_()
        return inputs

    def send_gradients(self, inputs: HandOff) -> None:
        """Hand the gradient of what was received back to the stage before."""
        assert self.gradients_out is not None, "the first stage has no stage to send gradients to"
        gradient = inputs.memory.grad
        assert gradient is not None, "the backward pass left no gradient of the stage's inputs"
        self.gradients_out.send(HandOff(gradient))

    def receive_gradients(self) -> Tensor:
        """Gradient of the sent memory, from the stage after."""
        assert self.gradients_in is not None, "the last stage has no stage to receive gradients from"
        return self.gradients_in.take().memory

    def _open(self, stage: int, below: int, above: int, down: dist.ProcessGroup, up: dist.ProcessGroup) -> None:
        """Open the two edges between this rank and a neighbor."""
        rank, probe = dist.get_rank(), torch.zeros(1, device=self._device)
        down_name = f"activations from stage {stage} to stage {stage + 1}"
        up_name = f"gradients from stage {stage + 1} to stage {stage}"
        peer = above if rank == below else below
        down_edge = Edge("activations", down, peer, partial(_failed, down_name))
        up_edge = Edge("gradients", up, peer, partial(_failed, up_name))
        down_edge.warm_up(probe, sends=rank == below)
        up_edge.warm_up(probe, sends=rank == above)
        gradients = HandOff(self.hand_off.memory)
        if rank == below:
            self.activations_out = Departures(down_name, Outbox(down_edge), self.hand_off)
            self.gradients_in = Arrivals(Inbox(up_edge, self.rules, self._waits), gradients, self._device)
        else:
            self.activations_in = Arrivals(Inbox(down_edge, self.rules, self._waits), self.hand_off, self._device)
            self.gradients_out = Departures(up_name, Outbox(up_edge), gradients)


def _described(hand_off: HandOff) -> str:
    tensors = hand_off.to_tuple()
    return ", ".join(f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors)


def _neighbors(grid: Grid) -> list[int]:
    """The ranks that this one watches: its pipeline neighbors, and its neighbors in a ring of all ranks."""
    rank, size, place = dist.get_rank(), grid.world_size, grid.coordinate(dist.get_rank())
    stages = (place.pipe - 1, place.pipe + 1)
    pipe = [grid.rank(stage, place.data, place.tensor) for stage in stages if 0 <= stage < grid.pipe]
    return sorted({*pipe, (rank - 1) % size, (rank + 1) % size} - {rank})


@contextmanager
def _failed(name: str, doing: str, peer: int | None) -> Iterator[None]:
    """Add the name of an edge to torch's error about a transfer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TransportError) or peer is None:
            raise  # `naming_lost_peers` handles the rest
        raise TransportError(
            f"{name}: the transfer failed; look for the first error of rank {peer}, or raise "
            f"parallel.timeout_s if that rank is merely slow"
        ) from error
