"""The CUDA graph interface of torch on a CPU: a capture records operations, a replay runs them on the same tensors.

Whatever a capture takes from the host stays as it was, as on a GPU, so a step that depends on such a value goes wrong.
Messages of a capture are sent and received by its replays alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stagdist.decode.layers.weights import Device
from stagdist.decode.runtime import graphs, outcome, stage
from stagdist.parallel.link import ALL_GATHER


class FakeStream:
    """A stream that does no work, and knows whether it belongs to a capture.

    Attributes:
        captured: it is the stream of a capture, or has waited for one that belongs to it.
        joined: after its last work in a capture, a stream of the capture has waited for it.
    """

    def __init__(self, device: object = None):
        self.waited_for: list[FakeStream] = []
        self.captured, self.joined = False, True

    def wait_stream(self, stream: "FakeStream") -> None:
        """Wait, by the rule of captures: CUDA fails with `cudaErrorStreamCaptureIsolation` otherwise."""
        if self.captured and not stream.captured:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        self.waited_for.append(stream)
        if stream.captured:
            self.captured, self.joined, stream.joined = True, False, True


class _Recording(TorchDispatchMode):
    def __init__(self, operations: list[Callable[[], None]]):
        super().__init__()
        self._operations = operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; the guard against it would import the compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Views and results of in-place operations follow the tensors that they share memory with.
        fresh = [_address(output) not in inputs for output in outputs]

        def again() -> None:
            values = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, value, is_fresh in zip(outputs, values, fresh, strict=True):
                if is_fresh:
                    output.copy_(value)

        self._operations.append(again)
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CapturedWork:
    """A handle of communication in a capture: it begins, and is waited for, in every replay."""

    def __init__(self, begin: Callable[[], Any], operations: list[Callable[[], None]]):
        self._begin, self._operations = begin, operations
        self._work: Any = None
        operations.append(self._run)

    def _run(self) -> None:
        self._work = self._begin()

    def wait(self) -> None:
        """Wait at this place of the graph."""
        self._operations.append(lambda: self._work.wait())

    def is_completed(self) -> bool:
        """A handle of a capture has no answer."""
        raise RuntimeError("a handle of captured communication was queried")


class FakeEvent:
    """An event behind everything that was issued before it."""

    def __init__(self, cuda: "FakeCuda"):
        self._cuda, self.number = cuda, len(cuda.of("record"))
        cuda.events.append(("record", self.number))

    def synchronize(self) -> None:
        """Wait on the host."""
        self._cuda.events.append(("wait", self.number))


class FakeGraph:
    """A `torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: "FakeCuda"):
        self._cuda = cuda
        self.operations: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Run the recorded operations again."""
        assert self.operations, "a replay of a graph without a capture, or after its reset"
        self._cuda.events.append(("replay", self))
        for number, operation in enumerate(self.operations):
            if number == len(self.operations) // 2:
                self._cuda.amid_replay()
            operation()

    def reset(self) -> None:
        """Forget them."""
        self._cuda.events.append(("reset", self))
        self.operations.clear()


@dataclass
class FakeCuda:
    """What `torch.cuda` was asked to do.

    Attributes:
        events: ("capture", graph, pool, stream), ("replay", graph), ("reset", graph), ("record", number of the event),
            ("wait", number of the event), ("synchronize",) and what tests add, by time.
        current: stream of the work that is issued now.
        capturing: inside a capture.
        amid_replay: called in the middle of every replay.
        buffers: in host memory, for values from the device.
    """

    events: list[tuple[Any, ...]] = field(default_factory=list)
    current: FakeStream = field(default_factory=FakeStream)
    capturing: bool = False
    streams: list[FakeStream] = field(default_factory=list)
    operations: list[Callable[[], None]] = field(default_factory=list)  # of the present capture
    amid_replay: Callable[[], None] = lambda: None
    buffers: list[Tensor] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for `torch.cuda` wherever `stagdist.decode.runtime` uses it."""
        for module in (graphs, stage, outcome):
            monkeypatch.setattr(module, "on_cuda", lambda device: True)
        monkeypatch.setattr(outcome, "record_event", lambda device: FakeEvent(self))
        for name in ("isend", "irecv", "all_reduce", "reduce", ALL_GATHER):
            monkeypatch.setattr(dist, name, self._captured(name, getattr(dist, name)))
        for name, stand_in in {
            "Stream": self._new_stream,
            "CUDAGraph": lambda: FakeGraph(self),
            "stream": self._stream,
            "graph": self._graph,
            "current_stream": lambda device=None: self.current,
            "device": lambda device: nullcontext(),
            "graph_pool_handle": object,
            "synchronize": lambda device=None: self.events.append(("synchronize",)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        host_buffer = Device.host_buffer

        def noting_buffer(device: Device, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            self.buffers.append(host_buffer(device, shape, dtype))
            return self.buffers[-1]

        monkeypatch.setattr(Device, "host_buffer", noting_buffer)

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether it would be in host memory: it belongs to a buffer of `Device.host_buffer`."""
        return _address(tensor) in map(_address, self.buffers)

    def _new_stream(self, device: object = None) -> FakeStream:
        self.streams.append(FakeStream(device))
        return self.streams[-1]

    def _captured(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self.capturing:
                return operation(*arguments, **options)
            if name in ("irecv", ALL_GATHER):
                # Here a capture computes, and must not take what memory happens to hold for a token.
                arguments[0].zero_()
            options |= {} if name in ("isend", "irecv") else {"async_op": True}
            work = CapturedWork(lambda: operation(*arguments, **options), self.operations)
            if "async_op" in options:
                work.wait()
            return work

        return call

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        """Events of one kind."""
        return [event for event in self.events if event[0] == kind]

    @contextmanager
    def _stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def _graph(
        self, graph: FakeGraph, pool: object = None, stream: FakeStream | None = None, capture_error_mode: str = ""
    ) -> Iterator[None]:
        assert stream is not None and not self.capturing and capture_error_mode == "thread_local"
        self.events.append(("capture", graph, pool, stream))
        self.capturing = stream.captured = True
        self.operations = graph.operations
        with self._stream(stream), _Recording(graph.operations):
            yield
        unjoined = [each for each in self.streams if each.captured and not each.joined and each is not stream]
        assert not unjoined, "the capture ends before all its streams have been joined"
        for each in self.streams:
            each.captured = False
        self.capturing = False
