"""CUDA graphs for a `Recorder`: what a capture enqueues is kept, and every replay enqueues it again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch

from stagdist.decode.runtime import graphs
from tests.decode.fake_cuda import FakeStream
from tests.parallel.nccl_rules import Action, Collective, Drain, Receive, Send, StreamWait
from tests.parallel.recording import Recorder


class RecordedGraph:
    """A `torch.cuda.CUDAGraph`.

    Attributes:
        actions: of one replay, with communications counted from 0.
        replays: how often it was replayed.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self.actions: list[Action] = []
        self.replays = 0

    def capture(self, actions: list[Action], first: int) -> None:
        """Take what was enqueued from communication number `first` on."""
        for action in actions:
            self.actions.append(StreamWait(action.number - first) if isinstance(action, StreamWait) else action)
        sent = sum(isinstance(action, Send | Receive | Collective) for action in actions)
        joined = {action.number for action in self.actions if isinstance(action, StreamWait)}
        assert joined == set(range(sent)), "a capture ends before all its communication has been joined"

    def replay(self) -> None:
        """Enqueue it."""
        self.replays += 1
        self._recorder.enqueue(self.actions)

    def reset(self) -> None:
        """Forget it."""
        self.actions.clear()


@contextmanager
def recorded_graphs(recorder: Recorder) -> Iterator[list[RecordedGraph]]:
    """Inside, steps are captured and replayed; gives the graphs."""
    made: list[RecordedGraph] = []

    def make() -> RecordedGraph:
        made.append(RecordedGraph(recorder))
        return made[-1]

    @contextmanager
    def capture(graph: RecordedGraph, **_: object) -> Iterator[None]:
        recorder.program.append(Drain())
        with recorder.cut() as (actions, first):
            yield
        graph.capture(actions, first)

    stand_ins = {
        "Stream": FakeStream,
        "CUDAGraph": make,
        "graph": capture,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: FakeStream(),
        "device": lambda device: nullcontext(),
        "graph_pool_handle": object,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(graphs, "on_cuda", lambda device: True))
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        yield made
