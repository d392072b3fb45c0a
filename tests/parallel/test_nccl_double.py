"""The double of NCCL: what stops its stream, and that it goes on."""

import threading
import time

from tests.parallel.nccl_double import Stream, Work


class Message:
    """An operation of gloo that ends when it is told to."""

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
    """Whether the stream has soon done everything."""
    deadline_s = time.monotonic() + 10.0
    while not stream.query() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return stream.query()


def test_what_follows_a_late_message_begins_when_it_has_come() -> None:
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


def test_an_operation_that_fails_stops_the_stream_in_silence() -> None:
    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    stream = Stream(patience_s=0.0)
    assert Work(lost, stream).wait()
    assert not stream.query()
