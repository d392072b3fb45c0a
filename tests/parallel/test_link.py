"""The ends of an edge: when receives are posted, in which order, and whom a wait that fails blames."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.errors import TransportError
from stagdist.parallel import link
from stagdist.parallel.link import GLOO, NCCL, DeviceWaits, Edge, Inbox, Outbox, Rules

PEER = 3


@dataclass
class Work:
    """A handle of an operation that completes when a test sets it."""

    log: list[str]
    name: str
    done: bool = False

    def wait(self) -> None:
        """Write it down."""
        self.log.append(f"wait {self.name}")

    def is_completed(self) -> bool:
        """As set by the test."""
        return self.done


@dataclass
class Backend:
    """Replaces `torch.distributed` and records what is posted."""

    log: list[str] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)

    def irecv(self, tensor: Tensor, src: int, group: Any) -> Work:
        """A receive."""
        return self._posted(f"receive {int(tensor)}")

    def isend(self, tensor: Tensor, dst: int, group: Any) -> Work:
        """A send."""
        return self._posted(f"send {int(tensor)}")

    def _posted(self, name: str) -> Work:
        self.log.append(name)
        self.works.append(Work(self.log, name))
        return self.works[-1]


@contextmanager
def errors(doing: str, peer: int | None) -> Iterator[None]:
    """As a transport names them."""
    try:
        yield
    except RuntimeError as error:
        raise TransportError(f"peer {peer} {doing}: {error}") from error


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """In the place of torch's."""
    made = Backend()
    monkeypatch.setattr(dist, "irecv", made.irecv)
    monkeypatch.setattr(dist, "isend", made.isend)
    return made


def edge(peer: int = PEER) -> Edge:
    """An edge to a peer."""
    group: Any = None
    return Edge("a hand-off", group, peer, errors)


def waits(rules: Rules, timeout_s: float = 60.0, lost: tuple[int, str] | None = None) -> DeviceWaits:
    """Waits with a watch that has noticed `lost`."""
    watch: Any = type("Watch", (), {"lost": lambda self: lost})()
    return DeviceWaits(rules, "cpu", timeout_s, errors, watch)


def inbox(rules: Rules) -> Inbox:
    """An inbox that expects a step and then two chunks, named by their buffers."""
    box = Inbox(edge(), rules, waits(rules))
    for number, key in enumerate((("step", 7), ("chunk", 0), ("chunk", 1))):
        box.expect(key, torch.tensor(number))
    return box


def test_gloo_posts_receives_when_they_are_expected(backend: Backend) -> None:
    box = inbox(GLOO)
    assert backend.log == ["receive 0", "receive 1", "receive 2"]
    assert int(box.take(("chunk", 0))[0]) == 1
    assert backend.log[3:] == ["wait receive 1"]


def test_nccl_posts_receives_when_they_are_taken_or_the_next_is_expected_in_the_order_of_the_sends(
    backend: Backend,
) -> None:
    box = Inbox(edge(), NCCL, waits(NCCL))
    box.expect(("step", 7), torch.tensor(0))
    assert backend.log == []
    box.expect(("chunk", 0), torch.tensor(1))
    assert backend.log == ["receive 0"], "the step was sent before the chunk"
    assert int(box.take(("chunk", 0))[0]) == 1
    assert backend.log == ["receive 0", "receive 1", "wait receive 1"]
    assert int(box.take(("step", 7))[0]) == 0
    assert backend.log[3:] == ["wait receive 0"]


def test_a_send_waits_only_for_those_beyond_the_ones_in_flight(backend: Backend) -> None:
    box = Outbox(edge())
    for number in range(3):
        box.send(torch.tensor(number), in_flight=1)
    assert backend.log == ["send 0", "send 1", "wait send 0", "send 2"]
    box.finish()
    assert backend.log[4:] == ["wait send 1", "wait send 2"]


def test_handles_of_messages_that_came_are_not_kept(backend: Backend) -> None:
    watched = waits(NCCL)
    box = Inbox(edge(), NCCL, watched)
    for number in range(100):
        box.expect(("step", number), torch.tensor(number))
        box.take(("step", number))
        backend.works[-1].done = True
    assert len(watched._in_flight) == 1


def stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that never becomes idle."""
    never: Any = type("Event", (), {"query": lambda self: False})()
    monkeypatch.setattr(link, "record_event", lambda device: never)


def test_a_wait_on_gloo_returns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck(monkeypatch)
    waits(GLOO, timeout_s=0.0, lost=(1, "gone")).wait("while it waited")


def test_the_limit_of_a_wait_blames_the_oldest_message_that_has_not_come(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck(monkeypatch)
    watched = waits(NCCL, timeout_s=0.05)
    for peer in (4, 5, 6):
        box = Inbox(edge(peer), NCCL, watched)
        box.expect(("step", 0), torch.tensor(peer))
        box.take(("step", 0))
    backend.works[0].done = True
    began_s = time.monotonic()
    with pytest.raises(
        TransportError, match=r"peer 5 while it waited for a hand-off: Timed out waiting 0.05 s for the"
    ):
        watched.wait("while it waited for the token")
    assert 0.05 <= time.monotonic() - began_s < 2


def test_a_peer_that_has_ended_is_blamed_before_one_that_is_late(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck(monkeypatch)
    watched = waits(NCCL, lost=(6, "Connection closed by peer"))
    box = Inbox(edge(5), NCCL, watched)
    box.expect(("step", 0), torch.tensor(0))
    box.take(("step", 0))
    with pytest.raises(TransportError, match="^peer 6 while it waited for the token: Connection closed by peer$"):
        watched.wait("while it waited for the token")
