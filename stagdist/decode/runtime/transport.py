"""Everything that travels between ranks while decoding, over communicators made and used once before the first step.

| communicator | members | carries | made when |
|---|---|---|---|
| edge | two neighbouring stages of one tensor rank | hand-offs | there are several stages |
| tokens | stages of one tensor rank | what the last stage publishes to the others | there are several stages |
| lane | stages of one tensor rank | sums of section outputs | sections are combined |
| world | all ranks | candidates of a sharded head | torch makes it for every process |
| tensor | tensor ranks of a stage | sums of partial products, candidates | there are several tensor ranks |
| control | all ranks, gloo | operations, prompts | always |
| watch | all ranks, gloo | nothing: notices ranks that end | on NCCL |

Point-to-point messages and collectives of one communicator run in order on NCCL, so tokens do not share one with sums.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

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

TOKEN: Key = ("token", 0)
"""There is one at a time."""


class _DelayedOutbox(Outbox):
    """Sends from a thread of its own after a delay, to measure how much of a slow link is hidden."""

    def __init__(self, edge: Edge, delay_s: float):
        super().__init__(edge)
        self._delay_s = delay_s
        self._queue: queue.Queue[tuple[float, Tensor, _Sent]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True, name="delayed hand-offs").start()

    def _start(self, tensor: Tensor) -> Any:
        sent = _Sent()
        self._queue.put((time.perf_counter() + self._delay_s, tensor, sent))
        return sent

    def _run(self) -> None:
        while True:
            due, tensor, sent = self._queue.get()
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                dist.send(tensor, self._edge.peer, group=self._edge.group)
            except Exception as error:  # raised again by whoever waits
                sent.error = error
            sent.done.set()


@dataclass
class _Sent:
    """Looks like the handle of a send."""

    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def wait(self) -> None:
        self.done.wait()  # the send inside has a time limit of its own
        if self.error is not None:
            raise RuntimeError(str(self.error)) from self.error


class Transport:
    """The ends of all communicators of this rank.

    Args:
        grid: pipe and tensor sizes; no data axis.
        device: where tensors live.
        timeout_s: limit of every wait.
        combined: section outputs are summed over the stages.
        hand_off_delay_s: artificial delay of every hand-off of a step.
        rules: of the backend; None: those of the device's.

    Raises:
        TransportError: a peer is gone or silent; names stage, peer and step.
    """

    def __init__(
        self,
        grid: Grid,
        device: str,
        timeout_s: float,
        *,
        combined: bool = False,
        hand_off_delay_s: float = 0.0,
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
        """Number of the present step, for errors."""
        self._lane_ranks = [grid.rank(stage, 0, self.tensor_rank) for stage in range(grid.pipe)]
        self._hand_off_in: Inbox | None = None
        self._hand_off_out: Outbox | None = None
        self._token_in: Inbox | None = None
        self._token_out: list[Outbox] = []
        self._lane: dist.ProcessGroup | None = None
        self._tensor: dist.ProcessGroup | None = None
        self._control: deque[tuple[int, Any, Tensor]] = deque()
        with self._errors("while the communicators were made"):
            self._watch = None
            if not self.rules.wait_blocks:
                # Rank 0 is the one that waits for the device; the others wait for its control messages.
                self._watch = PeerWatch(range(1, grid.world_size) if self.rank == 0 else [0], timeout_s)
            self._waits = DeviceWaits(self.rules, device, timeout_s, self._errors, self._watch)
            self._make_groups(combined, hand_off_delay_s)

    # --- hand-offs ----------------------------------------------------------------------------------------------

    def expect(self, key: Key, buffer: Tensor) -> None:
        """Say where the next hand-off goes; `key`, ("step", number) or ("chunk", number), names it for `arrived`."""
        assert self._hand_off_in is not None, "the first stage receives nothing"
        self._hand_off_in.expect(key, buffer)

    def arrived(self, key: Key) -> Tensor:
        """Wait for a hand-off."""
        assert self._hand_off_in is not None
        return self._hand_off_in.take(key)[0]

    def send(self, tensor: Tensor, in_flight: int) -> None:
        """Send to the stage after, without waiting; at most `in_flight` older sends may be on their way.

        The tensor must not be written again: errors of a send surface when a later one takes its place.
        """
        assert self._hand_off_out is not None, "the last stage sends nothing"
        self._hand_off_out.send(tensor.contiguous(), in_flight=in_flight)

    def finish_sends(self) -> None:
        """All hand-offs and tokens have left; errors have surfaced."""
        for outbox in (self._hand_off_out, *self._token_out):
            if outbox is not None:
                outbox.finish()

    # --- the end of a step --------------------------------------------------------------------------------------

    def sum_over_stages(self, tensor: Tensor, root: int | None) -> Tensor:
        """Sum over the stages, on stage `root` or on all. Shapes: kept."""
        assert self._lane is not None, "the communicators were made for sections that are not combined"
        tensor = tensor.contiguous()
        with self._errors("while section outputs were combined"):
            if root is None:
                dist.all_reduce(tensor, group=self._lane)
            else:
                dist.reduce(tensor, self._lane_ranks[root], group=self._lane)
        return tensor

    def publish(self, tensor: Tensor) -> None:
        """Give a tensor of the last stage to all others, without waiting; it must not be written again.

        Sends of their own instead of a broadcast: on gloo a broadcast takes three times as long.
        """
        for outbox in self._token_out:
            outbox.send(tensor, in_flight=0)

    def ask(self, tensor: Tensor) -> None:
        """Say where what the last stage publishes next goes."""
        assert self._token_in is not None, "the last stage receives no token"
        self._token_in.expect(TOKEN, tensor)

    def published(self) -> Tensor:
        """What the last stage published."""
        assert self._token_in is not None
        return self._token_in.take(TOKEN)[0]

    def wait_for_device(self, doing: str) -> None:
        """Return when the device has done everything enqueued so far, with the limit of every wait; at once on gloo.

        Args:
            doing: what for, for errors: "while it ...".
        """
        self._waits.wait(doing)

    def gather(self, tensor: Tensor, *, everywhere: bool) -> Tensor:
        """The tensor of every rank that holds a part of the head.

        Args:
            everywhere: all ranks (sharded head) or the tensor ranks of this stage.

        Shapes: [...] -> [R, ...].
        """
        group, size = (dist.group.WORLD, self.grid.world_size) if everywhere else (self._tensor, self.grid.tensor)
        if size == 1:
            return tensor[None]
        gathered = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
        with self._errors("while candidates were gathered"):
            getattr(dist, ALL_GATHER)(gathered, tensor.contiguous(), group=group)
        return gathered.unflatten(0, (size, -1))

    def tensor_sum(self) -> Callable[[Tensor], Tensor] | None:
        """Sum over the tensor ranks, in place; None when there is one."""
        if self.grid.tensor == 1:
            return None

        def reduce(partial: Tensor) -> Tensor:
            with self._errors("while tensor ranks added their parts"):
                dist.all_reduce(partial, group=self._tensor)
            return partial

        return reduce

    # --- control ------------------------------------------------------------------------------------------------

    def post_control(self, message: Tensor) -> None:
        """Give (rank 0) or ask for (others) the message of the next operation, without waiting."""
        peers = range(1, self.grid.world_size) if self.rank == 0 else [0]
        pass_on = dist.isend if self.rank == 0 else dist.irecv
        for peer in peers:
            with self._errors("while control was passed", peer):
                self._control.append((peer, pass_on(message, peer, group=self._host), message))

    def wait_control(self) -> Tensor:
        """The message of the next operation."""
        assert self._control, "control was not posted"
        while self._control:
            peer, work, message = self._control.popleft()
            with self._errors("while it waited for control", peer):
                work.wait()
        return message

    def share_admission(self, payload: Tensor) -> Tensor:
        """A request's prompt and parameters from rank 0, in place. Shapes: float64 [n]."""
        with self._errors("while a request was passed on", 0):
            dist.broadcast(payload, 0, group=self._host)
        return payload

    # --- set-up -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Part from the ranks that are watched, which do the same."""
        if self._watch is not None:
            self._watch.close(self._timeout_s)

    def _make_groups(self, combined: bool, delay_s: float) -> None:
        """Make every communicator, then use each: the first use makes its connections and blocks, so it comes now."""
        probe = torch.zeros(1, device=self._device)
        collectives: list[dist.ProcessGroup | None] = [dist.group.WORLD]
        gathered = probe.new_empty(self.grid.world_size)
        own: tuple[dist.ProcessGroup, list[dist.ProcessGroup]] | None = None
        for ranks in self.grid.pipe_groups() if self.grid.pipe > 1 else []:
            # Every rank makes every group, in one order, as torch wants it.
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
            self._open_edges(*own, delay_s, probe)

    def _open_edges(
        self, tokens: dist.ProcessGroup, edges: list[dist.ProcessGroup], delay_s: float, probe: Tensor
    ) -> None:
        """The edges of this rank, warmed up stage after stage."""
        *others, last = self._lane_ranks
        if self.rank == last:
            ends = [Edge("the token", tokens, peer, self._errors) for peer in others]
            self._token_out = [Outbox(end) for end in ends]
            for end in ends:
                end.warm_up(probe, sends=True)
        else:
            end = Edge("the token", tokens, last, self._errors)
            self._token_in = Inbox(end, self.rules, self._waits)
            end.warm_up(probe, sends=False)
        if self.stage > 0:
            end = Edge("a hand-off", edges[self.stage - 1], self._lane_ranks[self.stage - 1], self._errors)
            self._hand_off_in = Inbox(end, self.rules, self._waits)
            end.warm_up(probe, sends=False)
        if self.rank != last:
            end = Edge("a hand-off", edges[self.stage], self._lane_ranks[self.stage + 1], self._errors)
            self._hand_off_out = _DelayedOutbox(end, delay_s) if delay_s > 0 else Outbox(end)
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
                f"a process died, or was silent for {self._timeout_s:g} s (--timeout); see the output of that rank"
            ) from error
