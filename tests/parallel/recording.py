"""Records what one rank of the real code enqueues, without any other rank: `torch.distributed` is replaced.

Tensors are on the CPU, and received tensors are zero. Every operation of torch is a launch of a kernel.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stagdist.parallel.link import ALL_GATHER, PeerWatch, Rules
from tests.parallel.nccl_rules import (
    Action,
    Collective,
    Drain,
    HostBarrier,
    HostRecv,
    HostSend,
    HostWait,
    Launch,
    Receive,
    Send,
    StreamWait,
)

EARLY = Rules(early_receives=True, wait_blocks=False)
"""The policy that hangs on NCCL: receives are posted as early as on gloo."""
PRODUCTS = ("mm", "addmm", "bmm", "linear")
"""Operations whose kernel is chosen by the shape."""
KEYS = " over "
"""Precedes the shape of the keys in the name of an attention kernel."""
NO_KERNEL = ("empty", "new_empty", "equal", "lift_fresh", "detach", "_unsafe_view", "_reshape_alias", "resize_")


@dataclass(frozen=True)
class Group:
    """A communicator: its number, in the order of creation on all ranks, and its members."""

    number: int
    ranks: tuple[int, ...]
    gloo: bool = False

    def rank(self) -> int:
        """Rank of this process in the group, as in torch."""
        return self.ranks.index(dist.get_rank())

    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)


@dataclass
class Mailbox:
    """Messages between hosts, from ranks recorded earlier to ranks recorded later."""

    letters: dict[tuple[int, int, int], list[Any]] = field(default_factory=dict)  # (group, source, target)

    def put(self, group: Group, source: int, target: int, message: Any) -> None:
        """Store a message. It is not written to afterwards."""
        self.letters.setdefault((group.number, source, target), []).append(message)

    def take(self, group: Group, source: int, target: int, number: int) -> Any:
        """The message with this number."""
        return self.letters[group.number, source, target][number]


@cache
def _operation(func: Any) -> str | None:
    """Name of an operation of torch that does something on the device; None for views and the like."""
    name: str = func.overloadpacket.__name__
    return None if func.is_view or name.startswith(NO_KERNEL) else name


def _kernel(operation: str, args: Sequence[Any]) -> str:
    """Name of a kernel. Matrix products of other shapes, and attention over other keys, have other kernels."""
    if any(part in operation for part in PRODUCTS):
        return operation + str([tuple(each.shape) for each in args if isinstance(each, Tensor)])
    if "attention" in operation:
        query, keys, *more = [tuple(each.shape) for each in args if isinstance(each, Tensor)]
        return f"{operation}{query}, {2 + len(more)} tensors{KEYS}{keys}"
    return operation


class Work:
    """A handle, as torch returns it."""

    def __init__(self, on_wait: Callable[[], None]):
        self._on_wait = on_wait

    def wait(self, timeout: Any = None) -> bool:
        """Record the wait."""
        self._on_wait()
        return True

    def is_completed(self) -> bool:
        """True; only failing runs use it."""
        return True


class Recorder(TorchDispatchMode):
    """Records the program of one rank while it is active.

    Attributes:
        program: the actions so far.
        loaded: names of the kernels so far.
    """

    def __init__(self, rank: int, size: int, mailbox: Mailbox):
        super().__init__()
        self.rank, self.size, self._mailbox = rank, size, mailbox
        self.program: list[Action] = []
        self._world = Group(0, tuple(range(size)))
        self._groups = self._communications = self._meetings = 0
        self._letters: dict[tuple[int, int, int], int] = {}
        self.loaded: set[str] = set()
        self._quiet = False

    # --- compute ------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No guard against compilation around each of 100,000 operations: nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._quiet and (name := _operation(func)):
            if name == "_local_scalar_dense":
                self.program.append(HostWait())
            else:
                self.launch(_kernel(name, args))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Operations inside are not recorded."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def launch(self, name: str) -> None:
        """A kernel. In a row of launches only the first of each kernel, and one more, make a difference."""
        if name not in self.loaded or not self.program or not isinstance(self.program[-1], Launch):
            self.loaded.add(name)
            self.program.append(Launch(name))

    @contextmanager
    def cut(self) -> Iterator[tuple[list[Action], int]]:
        """Everything inside is taken out of the program; gives the actions, once it has ended, and the number of their
        first communication.
        """
        begin, first = len(self.program), self._communications
        actions: list[Action] = []
        yield actions, first
        actions += self.program[begin:]
        del self.program[begin:]
        self._communications = first

    def enqueue(self, actions: Sequence[Action]) -> None:
        """Add actions, whose communications are counted from 0."""
        first = self._communications
        for action in actions:
            self.program.append(StreamWait(first + action.number) if isinstance(action, StreamWait) else action)
            self._communications += isinstance(action, Send | Receive | Collective)

    # --- torch.distributed --------------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Everything inside is recorded as this rank."""
        names = ("new_group", "isend", "irecv", "send", "recv", "all_reduce", "reduce", "barrier",
                 "broadcast_object_list", "get_rank", "get_world_size")  # fmt: skip
        environment = {"RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.rank)}
        with (
            mock.patch.multiple(dist, **{name: getattr(self, name) for name in names}),
            mock.patch.object(dist, ALL_GATHER, self.all_gather),
            mock.patch.object(dist, "group", SimpleNamespace(WORLD=self._world)),
            mock.patch.object(torch.cuda, "synchronize", lambda *_: self.program.append(Drain())),
            mock.patch("stagdist.parallel.link.record_event", lambda device: self._event()),
            mock.patch.object(PeerWatch, "_watch", lambda self, rank: None),
            mock.patch.dict(os.environ, environment),
            self,
        ):
            yield self

    def get_rank(self, group: Any = None) -> int:
        """This rank."""
        return self.rank

    def get_world_size(self, group: Any = None) -> int:
        """Number of ranks."""
        return self.size if group is None else group.size()

    def new_group(self, ranks: Any = None, timeout: Any = None, backend: str | None = None, **_: Any) -> Group:
        """The next communicator."""
        self._groups += 1
        members = range(self.size) if ranks is None else ranks
        return Group(self._groups, tuple(members), gloo=backend == "gloo")

    def isend(self, tensor: Tensor, dst: int, group: Any = None, **_: Any) -> Work:
        """A message. Over gloo it is sent when the peer has posted its receive, and `wait` blocks until then."""
        group = group or self._world
        if not group.gloo:
            return self._communicate(Send(group.number, dst))
        with self._quietly():
            self._mailbox.put(group, self.rank, dst, tensor.clone())
        name = self._letter(group, self.rank, dst)
        self.program.append(HostSend(("sent", *name)))
        return Work(lambda: self.program.append(HostRecv(("posted", *name))))

    def irecv(self, tensor: Tensor, src: int, group: Any = None, **_: Any) -> Work:
        """A posted receive; the result is zero, over gloo what the peer has sent."""
        group = group or self._world
        if not group.gloo:
            with self._quietly():
                tensor.zero_()
            return self._communicate(Receive(group.number, src))
        name = self._letter(group, src, self.rank)
        with self._quietly():
            tensor.copy_(self._mailbox.take(group, src, self.rank, name[-1]))
        self.program.append(HostSend(("posted", *name)))
        return Work(lambda: self.program.append(HostRecv(("sent", *name))))

    def send(self, tensor: Tensor, dst: int, group: Any = None, **_: Any) -> None:
        """`isend` and wait."""
        self.isend(tensor, dst, group).wait()

    def recv(self, tensor: Tensor, src: int, group: Any = None, **_: Any) -> None:
        """`irecv` and wait."""
        self.irecv(tensor, src, group).wait()

    def all_reduce(self, tensor: Tensor, op: Any = None, group: Any = None, **_: Any) -> None:
        """A collective; over gloo a barrier of the hosts."""
        self._all(group or self._world)

    def reduce(self, tensor: Tensor, dst: int, op: Any = None, group: Any = None, **_: Any) -> None:
        """A collective."""
        self._all(group or self._world)

    def all_gather(self, output: Tensor, tensor: Tensor, group: Any = None, **_: Any) -> None:
        """A collective; all members contribute the same tensor as this rank."""
        with self._quietly():
            output.copy_(tensor.repeat(len(output) // len(tensor), *[1] * (tensor.dim() - 1)))
        self._all(group or self._world)

    def barrier(self, group: Any = None, **_: Any) -> None:
        """A collective that the host waits for."""
        self._all(group or self._world)
        self.program.append(HostWait())

    def broadcast_object_list(self, objects: list[Any], src: int, group: Group) -> None:
        """A collective of the hosts over gloo, simulated by a barrier, which is stricter."""
        if self.rank == src:
            for rank in group.ranks:
                self._mailbox.put(group, src, rank, objects[0])
                self._letter(group, src, rank)
        else:
            objects[0] = self._mailbox.take(group, src, self.rank, self._letter(group, src, self.rank)[-1])
        self._all(group)

    # --- inside -------------------------------------------------------------------------------------------------

    def _letter(self, group: Group, source: int, target: int) -> tuple[int, int, int, int]:
        line = (group.number, source, target)
        number = self._letters.get(line, 0)
        self._letters[line] = number + 1
        return (*line, number)

    def _communicate(self, action: Send | Receive | Collective) -> Work:
        number = self._communications
        self._communications += 1
        self.program.append(action)
        return Work(lambda: self.program.append(StreamWait(number)))

    def _all(self, group: Group) -> None:
        if group.size() == 1:
            return
        if group.gloo:
            self._meetings += 1
            self.program.append(HostBarrier((group.number, self._meetings), group.ranks))
        else:
            self._communicate(Collective(group.number, group.ranks)).wait()

    def _event(self) -> Any:
        """The host waits when it asks, for all that is enqueued by then, which may be more than at the event."""

        def query() -> bool:
            self.program.append(HostWait())
            return True

        return mock.Mock(query=query)
