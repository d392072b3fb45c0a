"""Point-to-point messages between ranks, with rules for each backend.

Each directed edge between two ranks has its own communicator, so that the messages of an edge arrive in the order in
which they are sent and no edge blocks another.

On gloo a receive is posted as soon as it is certain that the message will be sent, because a message without a posted
receive delays its sender by milliseconds. On NCCL a posted receive is a kernel that spins on the device until the peer
sends. Everything enqueued behind it on the same communicator or hardware queue waits, and so does loading a kernel.
Therefore **nothing is enqueued on NCCL whose completion depends on work that this rank has not launched yet**: a
receive is posted where it is waited for, or where the next one is announced. In a captured step with a lag, the receive
of a hand-off follows the rank's own sends of that step, which is all that its sender may wait for.
`tests/parallel/test_nccl_decoding.py` and `test_nccl_training.py` simulate decoding and training under these rules.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.parallel.device import on_cuda
from stagdist.parallel.lost_peer_phrases import short_reason
from stagdist.parallel.world import WATCHDOG_GRACE_S

_FOREVER = timedelta(days=365)
_SPIN_S = 0.005
_NAP_S = 0.0005

Errors = Callable[[str, int | None], AbstractContextManager[None]]
"""(what this rank was doing, peer or None for all) -> context that turns a RuntimeError of the backend into a
TransportError with stage, peer, step and remedy."""


ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""torch's collective that gathers into one tensor, renamed in torch 2.13."""

Key = tuple[str, int]
"""Name of a message within its edge: its kind and number."""


@dataclass(frozen=True)
class Rules:
    """What a backend does with an operation that cannot complete yet.

    Attributes:
        early_receives: a posted receive costs nothing until its message arrives.
        wait_blocks: `wait` blocks the host and raises. Otherwise it only orders streams on the device.
    """

    early_receives: bool
    wait_blocks: bool


GLOO = Rules(early_receives=True, wait_blocks=True)
NCCL = Rules(early_receives=False, wait_blocks=False)


def rules_of(device: str | torch.device) -> Rules:
    """The rules of the backend for a device."""
    return NCCL if on_cuda(device) else GLOO


def new_group(ranks: Sequence[int], rules: Rules, timeout_s: float) -> dist.ProcessGroup:
    """Create a communicator of these ranks. All ranks of the world call this, in the same order."""
    grace_s = 0.0 if rules.wait_blocks else WATCHDOG_GRACE_S
    return dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s + grace_s))


@dataclass(frozen=True)
class Edge:
    """One end of a directed edge.

    Attributes:
        what: what is sent on it, with an article, for error messages.
        group: communicator that only this edge uses.
        peer: global rank at the other end.
        errors: adds the edge to error messages.
    """

    what: str
    group: dist.ProcessGroup
    peer: int
    errors: Errors

    def warm_up(self, probe: Tensor, *, sends: bool) -> None:
        """Use the communicator once. The first use connects and blocks until both ends have called it."""
        with self.errors("while the communicators were created", self.peer):
            (dist.send if sends else dist.recv)(probe, self.peer, group=self.group)


class Inbox:
    """The receiving end of an edge.

    Args:
        waits: records the receives that the device has not finished.
    """

    def __init__(self, edge: Edge, rules: Rules, waits: "DeviceWaits"):
        self._edge, self._rules, self._waits = edge, rules, waits
        self._expected: deque[tuple[Key, tuple[Tensor, ...]]] = deque()
        self._posted: dict[Key, tuple[list[dist.Work], tuple[Tensor, ...]]] = {}

    def expect(self, key: Key, *buffers: Tensor, now: bool = False) -> None:
        """Announce the buffers of the next message. Messages arrive in the order of these calls.

        Args:
            key: the name to pass to `take`.
            now: post it now on any backend: all that the peer's send depends on has been launched.
        """
        if self._rules.early_receives or now:
            self._expected.append((key, buffers))
            self._post_up_to(key)
            return
        # The peer has launched the older messages by now. Without a posted receive, a large one would occupy the peer's
        # device until it is taken, and a kernel that the peer loads in that time would wait for it.
        if self._expected:
            self._post_up_to(self._expected[-1][0])
        self._expected.append((key, buffers))

    def take(self, key: Key) -> tuple[Tensor, ...]:
        """Wait for an expected message and return its buffers. Messages can be taken in any order.

        On NCCL, work that is enqueued later runs after the arrival.

        Raises:
            TransportError: the peer ended or does not respond (on NCCL, `DeviceWaits.wait` raises it).
        """
        if key not in self._posted:
            self._post_up_to(key)
        works, buffers = self._posted.pop(key)
        with self._edge.errors(f"while it waited for {self._edge.what}", self._edge.peer):
            for work in works:
                work.wait()
        self._waits.note(works, self._edge)
        return buffers

    def _post_up_to(self, key: Key) -> None:
        """Post the receives of all expected messages up to this one; the peer sends older ones first."""
        posted = None
        while posted != key:
            posted, buffers = self._expected.popleft()
            self._posted[posted] = (self._post(buffers), buffers)

    def _post(self, buffers: Iterable[Tensor]) -> list[dist.Work]:
        with self._edge.errors(f"while it posted a receive for {self._edge.what}", self._edge.peer):
            works = [dist.irecv(buffer, self._edge.peer, group=self._edge.group) for buffer in buffers]
        return [work for work in works if work is not None]


class Outbox:
    """The sending end of an edge. A send is waited for only when the limit of sends in flight is reached."""

    def __init__(self, edge: Edge):
        self._edge = edge
        # The tensors are kept with the work, because they must live until they are sent.
        self._pending: deque[tuple[list[dist.Work], tuple[Tensor, ...]]] = deque()

    def send(self, *tensors: Tensor, in_flight: int) -> None:
        """Send one message after waiting until at most `in_flight` older ones are in flight.

        The tensors must be contiguous and must not be written again.

        Raises:
            TransportError: the peer of this send or of an older one ended or does not respond.
        """
        while len(self._pending) > in_flight:
            self._wait_for_oldest()
        with self._edge.errors(f"while it sent {self._edge.what}", self._edge.peer):
            works = [self._start(tensor) for tensor in tensors]
        self._pending.append((works, tensors))

    def finish(self) -> None:
        """Wait until everything is sent.

        Raises:
            TransportError: as for `send`.
        """
        while self._pending:
            self._wait_for_oldest()

    def _start(self, tensor: Tensor) -> dist.Work:
        work = dist.isend(tensor, self._edge.peer, group=self._edge.group)
        assert work is not None, "this rank is a member of the edge's group"
        return work

    def _wait_for_oldest(self) -> None:
        works, _ = self._pending.popleft()
        with self._edge.errors(f"while {self._edge.what} was in flight", self._edge.peer):
            for work in works:
                work.wait()


def record_event(device: str | torch.device) -> torch.cuda.Event:
    """Record the point of the current stream after everything enqueued so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(torch.device(device)))
    return event


class DeviceWaits:
    """Waits of the host for the device, with a deadline and a check of the peers.

    NCCL's `wait` neither blocks nor raises, so a lost peer shows only as work that never completes. On a backend whose
    `wait` blocks, the method `wait` of this class returns immediately.

    Args:
        timeout_s: limit of every wait.
        peers: the watched ranks; None for no check.
        errors: describes the purpose of a wait when no receive explains its failure.
    """

    def __init__(
        self, rules: Rules, device: str | torch.device, timeout_s: float, errors: Errors, peers: "PeerWatch | None"
    ):
        self._rules, self._device, self._timeout_s, self._errors, self._peers = rules, device, timeout_s, errors, peers
        self._in_flight: deque[tuple[Sequence[dist.Work], Edge]] = deque()
        self._captures = False

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """Receives inside are captured into a graph: they run later, and their handles never complete."""
        self._captures = True
        try:
            yield
        finally:
            self._captures = False

    def note(self, works: Sequence[dist.Work], edge: Edge) -> None:
        """Record enqueued receives. The oldest one that has not completed explains a failed wait."""
        if self._rules.wait_blocks or self._captures:
            return
        self._forget_completed()
        self._in_flight.append((works, edge))

    def mark(self) -> torch.cuda.Event | None:
        """The point after everything enqueued so far on the current stream; None where there is nothing to wait for."""
        return None if self._rules.wait_blocks else record_event(self._device)

    def wait(self, doing: str, event: torch.cuda.Event | None = None) -> None:
        """Return when the device has reached a mark, by default one that is set now.

        Raises:
            TransportError: a watched peer ended, or the time limit was reached.
        """
        event = event or self.mark()
        if event is None:
            return
        deadline_s = time.monotonic() + self._timeout_s
        spin_until_s = time.monotonic() + _SPIN_S
        while not event.query():
            now_s = time.monotonic()
            lost = None if self._peers is None else self._peers.lost()
            if lost is not None or now_s > deadline_s:
                self._fail(doing, lost)
            time.sleep(0.0 if now_s < spin_until_s else _NAP_S)
        self._forget_completed()

    def _forget_completed(self) -> None:
        """A handle keeps the received tensors alive."""
        while self._in_flight and all(work.is_completed() for work in self._in_flight[0][0]):
            self._in_flight.popleft()

    def _fail(self, doing: str, lost: "tuple[int, str] | None") -> None:
        """Raise for the peer that ended, otherwise for the peer of the oldest message that has not arrived."""
        peer, reason = lost or (None, f"Timed out waiting {self._timeout_s:g} s for the device")
        late = [edge for works, edge in self._in_flight if not all(work.is_completed() for work in works)]
        blamed = [edge for edge in late if peer in (None, edge.peer)]
        if blamed:
            errors, peer, doing = blamed[0].errors, blamed[0].peer, f"while it waited for {blamed[0].what}"
        else:
            errors = self._errors
        with errors(doing, peer):
            raise RuntimeError(reason)


class PeerWatch:
    """Detects on the host, within a second, that a peer's process ended. A frozen peer is not detected.

    For each peer, a thread waits for a message that only `close` sends. The connection breaks when the process ends.

    Args:
        ranks: the ranks to watch; each of them watches this one. Every rank of the world creates a watch.
        timeout_s: limit for all ranks to connect.
    """

    def __init__(self, ranks: Iterable[int], timeout_s: float):
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._lost: list[tuple[int, str]] = []
        self._threads = {rank: threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in ranks}
        for thread in self._threads.values():
            thread.start()

    def lost(self) -> tuple[int, str] | None:
        """The first rank that ended and the reason from the backend; None while all are connected."""
        return self._lost[0] if self._lost else None

    def close(self, timeout_s: float) -> None:
        """Disconnect from all peers, which do the same. A peer that does not respond in time is ignored."""
        deadline_s = time.monotonic() + timeout_s
        connected = self._threads.keys() - {rank for rank, _ in self._lost}
        goodbyes = [dist.isend(torch.zeros(1), rank, group=self._group) for rank in connected]
        for thread in self._threads.values():
            thread.join(max(0.0, deadline_s - time.monotonic()))
        goodbyes.clear()  # kept until they have arrived

    def _watch(self, rank: int) -> None:
        try:
            work = dist.irecv(torch.zeros(1), rank, group=self._group)
            assert work is not None, "this rank is a member of the group"
            work.wait(_FOREVER)
        except RuntimeError as error:
            self._lost.append((rank, short_reason(error)))
