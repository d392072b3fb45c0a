"""Communication between ranks while decoding. All communicators are created and used once before the first step.

| communicator | members | carries | created if |
|---|---|---|---|
| edge | two neighboring stages of one tensor rank | hand-offs | there are several stages |
| tokens | stages of one tensor rank | what the last stage publishes to the others | there are several stages |
| lane | stages of one tensor rank | sums of section outputs | sections are combined |
| world | all ranks | candidates of a sharded head | always, by torch |
| tensor | tensor ranks of a stage | sums of partial products, candidates | there are several tensor ranks |
| control | all ranks, gloo | operations, requests | always |
| watch | all ranks, gloo | nothing: notices ranks that end | on NCCL |

On NCCL the operations of a communicator run in order, so tokens and sums use separate ones.
"""

import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.errors import ConfigError, TransportError
from stagdist.parallel.grid import Grid
from stagdist.parallel.link import (
    ALL_GATHER,
    DeviceWaits,
    Edge,
    Inbox,
    Key,
    Outbox,
    PeerWatch,
    Rules,
    new_group,
    rules_of,
)
from stagdist.parallel.lost_peer_phrases import short_reason
from stagdist.parallel.slow_link import DelayedOutbox, wait_until

TOKEN: Key = ("token", 0)
"""Key of all published messages: at most one is in flight."""


class Closable(Protocol):
    """What a transport closes before it ends."""

    def close(self) -> None:
        """Release what was captured."""


class Transport:
    """All communicators of this rank.

    Args:
        grid: pipe and tensor sizes; no data axis.
        device: device of the tensors.
        timeout_s: limit of every wait.
        combined: section outputs are summed over the stages.
        link_delay_s: artificial one-way latency of every message between ranks; a collective takes one longer.
        rules: of the backend; None selects those of the device's backend.

    Attributes:
        stage, tensor_rank: position of this rank in the grid.
        step: number of the current step, for error messages.
        hand_offs_in: from the stage before, with keys ("step", n) and ("chunk", n); not on the first stage.
        hand_offs_out: to the stage after; not on the last stage.
        tokens_in: what the last stage publishes, with the key `TOKEN`; not on the last stage.

    Raises:
        TransportError: a peer has ended or does not respond; names stage, peer and step.
    """

    def __init__(
        self,
        grid: Grid,
        device: str,
        timeout_s: float,
        *,
        combined: bool = False,
        link_delay_s: float = 0.0,
        rules: Rules | None = None,
    ):
        if dist.get_world_size() != grid.world_size or grid.data != 1:
            raise ConfigError(f"the grid {grid} needs {grid.world_size} ranks, {dist.get_world_size()} were started")
        self.grid, self._device, self._timeout_s = grid, device, timeout_s
        self.rules = rules_of(device) if rules is None else rules
        self.rank, self.combined = dist.get_rank(), combined
        place = grid.coordinate(self.rank)
        self.stage, self.tensor_rank = place.pipe, place.tensor
        self.step = 0
        self._lane_ranks = [grid.rank(stage, 0, self.tensor_rank) for stage in range(grid.pipe)]
        self.hand_offs_in: Inbox
        self.hand_offs_out: Outbox
        self.tokens_in: Inbox
        self._token_ends: list[Edge] = []
        self._hand_off_ends: list[Edge] = []  # one, but none on the last stage
        self._outboxes: list[Outbox] = []
        self._lane: dist.ProcessGroup | None = None
        self._tensor: dist.ProcessGroup | None = None
        self._control: deque[tuple[int, list[Any], list[Tensor]]] = deque()
        self._captured: weakref.WeakSet[Closable] = weakref.WeakSet()
        with self._errors("while the communicators were created"):
            self._watch = None
            if not self.rules.wait_blocks:
                # Rank 0 waits for the device; the others wait for its control messages.
                self._watch = PeerWatch(range(1, grid.world_size) if self.rank == 0 else [0], timeout_s)
            self._waits = DeviceWaits(self.rules, device, timeout_s, self._errors, self._watch)
            self._make_groups(combined)
            self.delay_links(link_delay_s)

    def delay_links(self, latency_s: float) -> None:
        """Let everything between ranks take this much longer, one way, from now on.

        All ranks call it while nothing is in flight, as after a rest. With 0 messages take their plain way.
        """
        self.finish_sends()
        self._delay_s = latency_s
        self._tokens_out = [self._outbox(end) for end in self._token_ends]
        self._control_out: list[Outbox] = []
        if self.rank == 0 and latency_s > 0:
            peers = range(1, self.grid.world_size)
            self._control_out = [self._outbox(Edge("control", self._host, peer, self._errors)) for peer in peers]
        hand_offs_out = [self._outbox(end) for end in self._hand_off_ends]
        if hand_offs_out:
            (self.hand_offs_out,) = hand_offs_out
        self._outboxes = [*self._tokens_out, *hand_offs_out, *self._control_out]

    def _outbox(self, end: Edge) -> Outbox:
        return DelayedOutbox(end, self._delay_s) if self._delay_s > 0 else Outbox(end)

    def _cross(self) -> None:
        """Spend the latency of a collective."""
        if self._delay_s > 0:
            wait_until(time.perf_counter() + self._delay_s)

    def finish_sends(self) -> None:
        """Wait until all hand-offs and tokens, and delayed control messages, are sent; raise their errors."""
        for outbox in self._outboxes:
            outbox.finish()

    # --- the end of a step --------------------------------------------------------------------------------------

    def sum_over_stages(self, tensor: Tensor, root: int | None) -> Tensor:
        """Sum over the stages, on stage `root` or on all. Shapes: kept."""
        assert self._lane is not None, "the transport was created with combined=False"
        tensor = tensor.contiguous()
        with self._errors("while section outputs were combined"):
            self._cross()
            if root is None:
                dist.all_reduce(tensor, group=self._lane)
            else:
                dist.reduce(tensor, self._lane_ranks[root], group=self._lane)
        return tensor

    def publish(self, tensor: Tensor) -> None:
        """Send a tensor of the last stage to all others without waiting; it must not be written again.

        Separate sends, because a broadcast takes three times as long on gloo.
        """
        for outbox in self._tokens_out:
            outbox.send(tensor, in_flight=0)

    def mark(self) -> torch.cuda.Event | None:
        """The point after all work enqueued so far, for `wait_for_device`; None on gloo, where no work is enqueued."""
        return self._waits.mark()

    def wait_for_device(self, doing: str, event: torch.cuda.Event | None = None) -> None:
        """Wait until the device has reached a mark, or completed all enqueued work; returns immediately on gloo.

        Args:
            doing: reason for error messages, "while ...".
        """
        self._waits.wait(doing, event)

    def capturing(self) -> AbstractContextManager[None]:
        """Communication inside is captured into a graph."""
        return self._waits.unnoted()

    def close_first(self, captured: Closable) -> None:
        """Register graphs that `close` must release first: NCCL does not destroy a communicator while graphs use it."""
        self._captured.add(captured)

    def gather(self, tensor: Tensor, *, everywhere: bool) -> Tensor:
        """Gather the tensors of all ranks that hold a part of the head.

        Args:
            everywhere: all ranks (sharded head) or the tensor ranks of this stage.

        Shapes: [...] -> [R, ...].
        """
        group, size = (dist.group.WORLD, self.grid.world_size) if everywhere else (self._tensor, self.grid.tensor)
        if size == 1:
            return tensor[None]
        gathered = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
        with self._errors("while candidates were gathered"):
            self._cross()
            getattr(dist, ALL_GATHER)(gathered, tensor.contiguous(), group=group)
        return gathered.unflatten(0, (size, -1))

    def tensor_sum(self) -> Callable[[Tensor], Tensor] | None:
        """Return a function that sums in place over the tensor ranks; None if there is one."""
        if self.grid.tensor == 1:
            return None

        def reduce(partial: Tensor) -> Tensor:
            with self._errors("while tensor ranks added their parts"):
                self._cross()
                dist.all_reduce(partial, group=self._tensor)
            return partial

        return reduce

    # --- control ------------------------------------------------------------------------------------------------

    def post_control(self, message: Tensor, payload: bytes = b"") -> None:
        """Send (rank 0) or receive (others) the message of the next operation, without waiting.

        Args:
            payload: sent after the message; the others learn its size from the message.
        """
        parts = [message]
        if payload:
            parts.append(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        for outbox in self._control_out:
            outbox.send(*parts, in_flight=0)
        if self._control_out:
            self._control.append((0, [], parts))  # what is on a slow link is not waited for
            return
        peers = range(1, self.grid.world_size) if self.rank == 0 else [0]
        transfer = dist.isend if self.rank == 0 else dist.irecv
        for peer in peers:
            with self._errors("while control was sent", peer):
                works = [transfer(part, peer, group=self._host) for part in parts]
            self._control.append((peer, works, parts))

    def wait_control(self) -> Tensor:
        """Wait for the message of the next operation and return it."""
        assert self._control, "control was not posted"
        while self._control:
            peer, works, (message, *_) = self._control.popleft()
            with self._errors("while it waited for control", peer):
                for work in works:
                    work.wait()
        return message

    def exchange(self, own: Tensor) -> Tensor:
        """Give all ranks the tensors of all ranks, in host memory. Shapes: [n] -> [ranks, n]."""
        gathered = own.new_empty(self.grid.world_size * len(own))
        with self._errors("while all ranks reported"):
            self._cross()
            getattr(dist, ALL_GATHER)(gathered, own, group=self._host)
        return gathered.unflatten(0, (self.grid.world_size, -1))

    def receive_payload(self, size: int) -> bytes:
        """Receive the payload that follows a message, on the ranks after rank 0."""
        if size == 0:
            return b""
        payload = torch.empty(size, dtype=torch.uint8)
        with self._errors("while it waited for a request", 0):
            dist.recv(payload, 0, group=self._host)
        return payload.numpy().tobytes()

    # --- set-up -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release graphs and stop watching the peers; all ranks call this, after a rest."""
        for captured in list(self._captured):
            captured.close()
        if self._watch is not None:
            self._watch.close(self._timeout_s)

    def _make_groups(self, combined: bool) -> None:
        """Create every communicator, then use each: the first use connects and blocks."""
        probe = torch.zeros(1, device=self._device)
        collectives: list[dist.ProcessGroup | None] = [dist.group.WORLD]
        gathered = probe.new_empty(self.grid.world_size)
        own: tuple[dist.ProcessGroup, list[dist.ProcessGroup]] | None = None
        for ranks in self.grid.pipe_groups() if self.grid.pipe > 1 else []:
            # torch requires that every rank creates every group, in the same order.
            tokens = new_group(ranks, self.rules, self._timeout_s)
            lane = new_group(ranks, self.rules, self._timeout_s) if combined else None
            edges = [new_group(pair, self.rules, self._timeout_s) for pair in itertools.pairwise(ranks)]
            if self.rank in ranks:
                self._lane, own = lane, (tokens, edges)
                collectives.append(lane)
        for ranks in self.grid.tensor_groups() if self.grid.tensor > 1 else []:
            group = new_group(ranks, self.rules, self._timeout_s)
            if self.rank in ranks:
                self._tensor = group
                collectives.append(group)
        self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
        for made in collectives:
            if made is not None:
                dist.all_reduce(probe, group=made)
                getattr(dist, ALL_GATHER)(gathered[: dist.get_world_size(made)], probe, group=made)
        if self._lane is not None:
            dist.reduce(probe, self._lane_ranks[-1], group=self._lane)
        dist.all_reduce(torch.zeros(1), group=self._host)
        if own is not None:
            self._open_edges(*own, probe)

    def _open_edges(self, tokens: dist.ProcessGroup, edges: list[dist.ProcessGroup], probe: Tensor) -> None:
        """Open the edges of this rank, one stage after the other."""
        *others, last = self._lane_ranks
        if self.rank == last:
            self._token_ends = [Edge("the token", tokens, peer, self._errors) for peer in others]
            for end in self._token_ends:
                end.warm_up(probe, sends=True)
        else:
            end = Edge("the token", tokens, last, self._errors)
            self.tokens_in = Inbox(end, self.rules, self._waits)
            end.warm_up(probe, sends=False)
        if self.stage > 0:
            end = Edge("a hand-off", edges[self.stage - 1], self._lane_ranks[self.stage - 1], self._errors)
            self.hand_offs_in = Inbox(end, self.rules, self._waits)
            end.warm_up(probe, sends=False)
        if self.rank != last:
            end = Edge("a hand-off", edges[self.stage], self._lane_ranks[self.stage + 1], self._errors)
            self._hand_off_ends = [end]
            end.warm_up(probe, sends=True)

    @contextmanager
    def _errors(self, when: str, peer: int | None = None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, TransportError):
                raise
            whom = "its peers" if peer is None else f"stage {self.grid.coordinate(peer).pipe} (rank {peer})"
            raise TransportError(
                f"stage {self.stage} (rank {self.rank}) lost {whom} in step {self.step} {when}: {short_reason(error)}; "
                f"a process ended or did not respond for {self._timeout_s:g} s (--timeout); see the output of that rank"
            ) from error
