"""The double of NCCL: what stops its stream, and when it continues."""

import threading
import time

from tests.parallel.nccl_double import Stream, Work


class Message:
    """An operation of gloo that completes when `comes` is set."""

    def __init__(self) -> None:
        self.begun, self.comes = False, threading.Event()

    def post(self) -> "Message":
        """Begin."""
        self.begun = True
        return self

    def wait(self) -> None:
        """Block, as gloo does."""
        self.comes.wait()


def becomes_idle(stream: Stream) -> bool:
    """Whether the stream is idle soon."""
    deadline_s = time.monotonic() + 10.0
    while not stream.query() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return stream.query()


def test_operations_behind_a_late_message_begin_when_it_arrives() -> None:
    stream, late, after = Stream(patience_s=0.0), Message(), Message()
    Work(late.post, stream).wait()
    behind = Work(after.post, stream)
    assert late.begun and not after.begun and not stream.query()
    late.comes.set()
    assert becomes_idle(stream) and after.begun
    behind.wait()
    assert not stream.query()
    after.comes.set()
    assert becomes_idle(stream)


def test_a_failed_operation_stops_the_stream_without_an_error() -> None:
    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    stream = Stream(patience_s=0.0)
    assert Work(lost, stream).wait()
    assert not stream.query()
