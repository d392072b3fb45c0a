"""Everything that travels between ranks while decoding, over communicators made and used once before the first step.

One communicator per directed edge and tensor rank for hand-offs, one per tensor rank over the stages for combined
outputs and tokens, one of all ranks for a sharded head, one for tensor parallelism, and one on the host for control.
"""

import itertools
import queue
import re
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

Key = tuple[str, int]
"""Name of a hand-off: ("step", number) or ("chunk", number)."""


@dataclass
class _Edge:
    """One direction between two neighbouring stages."""

    group: dist.ProcessGroup
    peer: int


class _DelayedSends:
    """Sends from a thread of its own after a delay, to measure how much of a slow link is hidden."""

    def __init__(self, edge: _Edge, delay_s: float):
        self._edge, self._delay_s = edge, delay_s
        self._queue: queue.Queue[tuple[float, Tensor, _Sent]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True, name="delayed hand-offs").start()

    def send(self, tensor: Tensor) -> "_Sent":
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
        hand_off_delay_s: artificial delay of every hand-off of a step.

    Raises:
        TransportError: a peer is gone or silent; names stage, peer and step.
    """

    def __init__(self, grid: Grid, device: str, timeout_s: float, *, hand_off_delay_s: float = 0.0):
        if dist.get_world_size() != grid.world_size or grid.data != 1:
            raise ConfigError(f"the grid {grid} needs {grid.world_size} ranks, {dist.get_world_size()} were started")
        self.grid, self._device, self._timeout_s = grid, device, timeout_s
        self.rank = dist.get_rank()
        place = grid.coordinate(self.rank)
        self.stage, self.tensor_rank = place.pipe, place.tensor
        self.step = 0
        """Number of the present step, for errors."""
        with self._errors("while the communicators were made"):
            self._make_groups()
            self._warm_up()
        self._inbox: dict[Key, tuple[Any, Tensor]] = {}
        self._outbox: deque[tuple[Any, Tensor]] = deque()
        self._asked: tuple[Any, Tensor] | None = None
        self._published: deque[tuple[Any, Tensor]] = deque()
        self._control: deque[tuple[Any, Tensor]] = deque()
        delayed = hand_off_delay_s > 0 and self._out is not None
        self._delayed = _DelayedSends(self._out, hand_off_delay_s) if delayed and self._out else None

    # --- hand-offs ----------------------------------------------------------------------------------------------

    def expect(self, key: Key, buffer: Tensor) -> None:
        """Post the receive of a hand-off; `key` names it for `arrived`."""
        assert self._in is not None, "the first stage receives nothing"
        with self._errors("while it asked for a hand-off", self._in.peer):
            self._inbox[key] = (dist.irecv(buffer, self._in.peer, group=self._in.group), buffer)

    def arrived(self, key: Key) -> Tensor:
        """Wait for the hand-off `key`."""
        assert self._in is not None
        work, buffer = self._inbox.pop(key)
        with self._errors("while it waited for a hand-off", self._in.peer):
            work.wait()
        return buffer

    def send(self, tensor: Tensor, outstanding: int) -> None:
        """Send to the stage after, without waiting; at most `outstanding` older sends may be on their way.

        The tensor must not be written again: errors of a send surface when a later one takes its place.
        """
        assert self._out is not None, "the last stage sends nothing"
        while len(self._outbox) > outstanding:
            self._wait_for_oldest_send()
        tensor = tensor.contiguous()
        with self._errors("while it sent a hand-off", self._out.peer):
            if self._delayed is not None:
                self._outbox.append((self._delayed.send(tensor), tensor))
            else:
                self._outbox.append((dist.isend(tensor, self._out.peer, group=self._out.group), tensor))

    def finish_sends(self) -> None:
        """All hand-offs and tokens have left; errors have surfaced."""
        while self._outbox:
            self._wait_for_oldest_send()
        while self._published:
            self._wait_for_published()

    def _wait_for_oldest_send(self) -> None:
        assert self._out is not None
        work, _ = self._outbox.popleft()
        with self._errors("while a hand-off was on its way", self._out.peer):
            work.wait()

    def _wait_for_published(self) -> None:
        work, _ = self._published.popleft()
        with self._errors("while a token was on its way"):
            work.wait()

    # --- the end of a step --------------------------------------------------------------------------------------

    def sum_over_stages(self, tensor: Tensor, root: int | None) -> Tensor:
        """Sum over the stages, on stage `root` or on all. Shapes: kept."""
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
        while self._published:
            self._wait_for_published()
        for peer in self._lane_ranks[:-1]:
            with self._errors("while it sent the token", peer):
                self._published.append((dist.isend(tensor, peer, group=self._lane), tensor))

    def ask(self, tensor: Tensor) -> None:
        """Post the receive of what the last stage publishes next."""
        peer = self._lane_ranks[-1]
        with self._errors("while it asked for the token", peer):
            self._asked = (dist.irecv(tensor, peer, group=self._lane), tensor)

    def published(self) -> Tensor:
        """What the last stage published."""
        assert self._asked is not None, "the token was not asked for"
        (work, tensor), self._asked = self._asked, None
        with self._errors("while it waited for the token", self._lane_ranks[-1]):
            work.wait()
        return tensor

    def gather(self, tensor: Tensor, *, everywhere: bool) -> Tensor:
        """The tensor of every rank that holds a part of the head.

        Args:
            everywhere: all ranks (sharded head) or the tensor ranks of this stage.

        Shapes: [...] -> [R, ...].
        """
        group, size = (dist.group.WORLD, self.grid.world_size) if everywhere else (self._tensor, self.grid.tensor)
        if size == 1:
            return tensor[None]
        gathered = tensor.new_empty(size, *tensor.shape)
        with self._errors("while candidates were gathered"):
            dist.all_gather(list(gathered), tensor.contiguous(), group=group)
        return gathered

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
                self._control.append((pass_on(message, peer, group=self._host), message))

    def wait_control(self) -> Tensor:
        """The message of the next operation."""
        assert self._control, "control was not posted"
        while self._control:
            work, message = self._control.popleft()
            with self._errors("while it waited for control"):
                work.wait()
        return message

    def share_admission(self, payload: Tensor) -> Tensor:
        """A request's prompt and parameters from rank 0, in place. Shapes: float64 [n]."""
        with self._errors("while a request was passed on", 0):
            dist.broadcast(payload, 0, group=self._host)
        return payload

    # --- set-up -------------------------------------------------------------------------------------------------

    def _make_groups(self) -> None:
        grid, limit = self.grid, timedelta(seconds=self._timeout_s)
        self._in = self._out = None
        for ranks in grid.pipe_groups():
            # Every rank makes every group, in one order, as torch wants it.
            lane = dist.new_group(ranks, timeout=limit)
            if self.rank in ranks:
                self._lane, self._lane_ranks = lane, ranks
            for below, above in itertools.pairwise(ranks):
                edge = dist.new_group([below, above], timeout=limit)
                if self.rank == below:
                    self._out = _Edge(edge, above)
                elif self.rank == above:
                    self._in = _Edge(edge, below)
        for ranks in grid.tensor_groups():
            group = dist.new_group(ranks, timeout=limit)
            if self.rank in ranks:
                self._tensor = group
        self._host = dist.new_group(backend="gloo", timeout=limit)

    def _warm_up(self) -> None:
        """The first use of a communicator makes its connections and blocks: do it now, stage after stage."""
        probe = torch.zeros(1, device=self._device)
        for group in (dist.group.WORLD, self._lane, self._tensor):
            dist.all_reduce(probe, group=group)
        dist.all_reduce(torch.zeros(1), group=self._host)
        if self.stage == self.grid.pipe - 1:
            for peer in self._lane_ranks[:-1]:
                dist.send(probe, peer, group=self._lane)
        else:
            dist.recv(probe, self._lane_ranks[-1], group=self._lane)
        if self._in is not None:
            dist.recv(probe, self._in.peer, group=self._in.group)
        if self._out is not None:
            dist.send(probe, self._out.peer, group=self._out.group)

    @contextmanager
    def _errors(self, when: str, peer: int | None = None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, TransportError):
                raise
            whom = "its peers" if peer is None else f"stage {self.grid.coordinate(peer).pipe} (rank {peer})"
            reason = _short(str(error)) or type(error).__name__
            raise TransportError(
                f"stage {self.stage} (rank {self.rank}) lost {whom} in step {self.step} {when}: {reason}; a process "
                f"died, or was silent for {self._timeout_s:g} s (--timeout); see the output of that rank"
            ) from error


def _short(reason: str) -> str:
    """What gloo says, without the place in its source and its general advice."""
    first = reason.partition("\n")[0]
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", first).partition(". This is typically")[0]
