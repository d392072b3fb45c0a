"""Records what a real rank enqueues while it runs: torch's process groups are patched."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.nccl_rules import (
    Action,
    Collective,
    HostBarrier,
    HostRecv,
    HostSend,
    HostWait,
    Launch,
    Receive,
    Send,
    StreamWait,
)
from tests.parallel.recording import NO_KERNEL

COLLECTIVES = ("allreduce", "reduce", "broadcast", "allgather", "_allgather_base", "all_gather_single", "barrier")
NOT_RECORDED = (
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "allreduce_coalesced",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
    "reduce_scatter_single",
    "gather",
    "scatter",
    "monitored_barrier",
    "recv_anysource",
)
"""Operations that no rank uses. They raise, so that a DeepSpeed release that uses one is noticed."""


class Handle:
    """A handle whose wait is recorded."""

    def __init__(self, work: Any, on_wait: Callable[[], None]):
        self._work, self._on_wait = work, on_wait

    def wait(self, *arguments: Any) -> Any:
        """As in torch."""
        self._on_wait()
        return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _refused(name: str) -> Callable[..., Any]:
    def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{name} of a process group is not recorded; add it to COLLECTIVES")

    return call


class LiveRecorder(TorchDispatchMode):
    """Records the program of one real rank while it is open.

    Args:
        control: group of the hosts; its operations are not work of the device.

    Attributes:
        program: the actions so far.
    """

    def __init__(self, control: dist.ProcessGroup):
        super().__init__()
        self._control = control.group_name
        self.program: list[Action] = []
        self._loaded: set[str] = set()
        self._communications = self._meetings = 0
        self._letters: dict[tuple[int, int], int] = {}
        # Releases of torch use different names for the same operation.
        names = [name for name in (*COLLECTIVES, "send", "recv") if hasattr(dist.ProcessGroup, name)]
        self._originals = {name: getattr(dist.ProcessGroup, name) for name in names}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.program.append(HostWait())
        elif not func.is_view and not name.startswith(NO_KERNEL) and func.namespace == "aten":
            if name not in self._loaded or not self.program or not isinstance(self.program[-1], Launch):
                self._loaded.add(name)
                self.program.append(Launch(name))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def open(self) -> Iterator["LiveRecorder"]:
        """Everything inside is recorded."""
        with ExitStack() as stack:
            for name in self._originals.keys() & set(COLLECTIVES):
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, self._collective(name)))
            for name in NOT_RECORDED:
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, _refused(name), create=True))
            stack.enter_context(mock.patch.object(dist.ProcessGroup, "send", self._message("send", Send, HostSend)))
            stack.enter_context(mock.patch.object(dist.ProcessGroup, "recv", self._message("recv", Receive, HostRecv)))
            stack.enter_context(self)
            yield self

    def device_waits(self) -> None:
        """The host waits for the compute stream here."""
        self.program.append(HostWait())

    def _collective(self, name: str) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            members = tuple(dist.get_process_group_ranks(group))
            work = self._originals[name](group, *arguments, **options)
            if group.group_name == self._control:
                self._meetings += 1
                self.program.append(HostBarrier(self._meetings, members))
                return work
            if len(members) == 1:
                return work
            handle = self._communicated(Collective(group.group_name, members), work)
            if name == "barrier":
                self.program.append(HostWait())
            return handle

        return call

    def _message(self, name: str, action: type[Send] | type[Receive], letter: type[HostSend] | type[HostRecv]) -> Any:
        def call(group: dist.ProcessGroup, tensors: list[Tensor], place: int, tag: int = 0) -> Any:
            peer, rank = dist.get_process_group_ranks(group)[place], dist.get_rank()
            work = self._originals[name](group, tensors, place, tag)
            if group.group_name != self._control:
                return self._communicated(action(group.group_name, peer), work)
            line = (rank, peer) if name == "send" else (peer, rank)
            self._letters[line] = number = self._letters.get(line, 0) + 1
            self.program.append(letter((*line, number)))
            return work

        return call

    def _communicated(self, action: Send | Receive | Collective, work: Any) -> Handle:
        number = self._communications
        self._communications += 1
        self.program.append(action)
        return Handle(work, lambda: self.program.append(StreamWait(number)))
