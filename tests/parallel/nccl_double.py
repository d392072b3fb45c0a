"""A double of NCCL on gloo: `wait` neither blocks for long nor raises, and a lost message stops the device."""

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

from stagdist.parallel.link import ALL_GATHER, NCCL

OPERATIONS = ("isend", "irecv", "all_reduce", "reduce", "broadcast", ALL_GATHER)

WRITTEN = {"irecv": "tensor", ALL_GATHER: "output_tensor"}
"""Operations that write a tensor without reading it, and the argument that is this tensor."""


class Stream:
    """The compute stream of a device with its queue. It stops while a message that it needs is missing.

    Args:
        patience_s: how long the host waits for such a message before it continues with wrong tensors.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._line: deque[tuple[Work, bool]] = deque()  # pending: an operation to begin, or one to wait for

    def enqueue(self, work: "Work") -> None:
        """Begin an operation as soon as the stream reaches it."""
        self._append(work, False)

    def wait(self, work: "Work") -> None:
        """Make the stream wait for an operation, and the host for a moment."""
        if self.query():
            work.ended.wait(self._patience_s)
        self._append(work, True)

    def query(self) -> bool:
        """Whether the stream is idle."""
        return not self._line

    def advance(self) -> None:
        """Run as far as possible."""
        with self._lock:
            while self._line:
                work, awaited = self._line[0]
                if awaited and not work.is_completed():
                    return
                if not awaited:
                    work.begin()
                self._line.popleft()

    def _append(self, work: "Work", awaited: bool) -> None:
        with self._lock:
            self._line.append((work, awaited))
        self.advance()


class Work:
    """A handle as in NCCL: an operation that does not complete stops the device, not the host, and raises nothing.

    Args:
        post: starts the operation over gloo.
    """

    def __init__(self, post: Callable[[], Any], stream: Stream):
        self._post, self._stream = post, stream
        self.ended = threading.Event()
        stream.enqueue(self)

    def begin(self) -> None:
        """Start the operation; a thread waits for its end."""
        threading.Thread(target=self._run, args=(self._started(),), daemon=True).start()

    def wait(self, timeout: Any = None) -> bool:
        """Return soon, even after a failure."""
        self._stream.wait(self)
        return True

    def is_completed(self) -> bool:
        """Whether the operation has ended."""
        return self.ended.is_set()

    def _started(self) -> Any:
        try:
            return self._post()
        except RuntimeError:
            return None  # the peer is gone

    def _run(self, work: Any) -> None:
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError:
            return
        self.ended.set()
        self._stream.advance()


@contextmanager
def like_nccl(patience_s: float) -> Iterator[None]:
    """Inside, messages, collectives and events behave as in NCCL, except in groups created with gloo."""
    stream = Stream(patience_s)
    hosts: set[Any] = set()
    new_group = dist.new_group

    def noting(ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        group = new_group(ranks, timeout=timeout, backend=backend, **options)
        if backend == "gloo":
            hosts.add(group)
        return group

    def silent(operation: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(operation)

        def call(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options).arguments
            if bound.get("group") in hosts:
                return operation(**bound)
            if operation.__name__ in WRITTEN:
                bound[WRITTEN[operation.__name__]].zero_()  # the host continues with it if the message does not arrive
            if "async_op" not in signature.parameters:
                return Work(lambda: operation(**bound), stream)
            work = Work(lambda: operation(**bound | {"async_op": True}), stream)
            if bound.get("async_op"):
                return work
            work.wait()
            return None

        return call

    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(dist, name, silent(getattr(dist, name))))
        stack.enter_context(mock.patch.object(dist, "new_group", noting))
        stack.enter_context(mock.patch("stagdist.parallel.link.record_event", lambda device: stream))
        stack.enter_context(mock.patch("stagdist.training.engine.exchange.rules_of", lambda device: NCCL))
        yield
