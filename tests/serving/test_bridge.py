"""Between engine and HTTP process: one message per operation, acceptance before outputs, signs of life, and ends."""

import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stagdist.decode.engine_stats import EngineStats, SlotState, StageReport
from stagdist.decode.request import FinishReason, Request, RequestOutput, RequestTimes, TokenLogprobs
from stagdist.errors import ConfigError, QueueFullError
from stagdist.serving import bridge as bridge_module
from stagdist.serving.bridge import EngineBridge
from stagdist.serving.http_child import HttpProcess, HttpProcessError
from stagdist.serving.protocol import pack, receive
from stagdist.serving.settings import ServerSettings


class FakeEngine:
    """Accepts requests, except those with a prompt that says otherwise, and answers from within `submit`."""

    def __init__(self) -> None:
        self.requests: list[tuple[Request, float | None]] = []
        self.cancelled: list[str] = []
        self.stopped = threading.Event()
        self.drained: list[float] = []
        self.bridge: EngineBridge | None = None
        self.answers: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()

    def submit(self, request: Request, *, deadline_s: float | None = None) -> None:
        if request.prompt_ids == (13,):
            raise QueueFullError("3 requests wait")
        if not request.prompt_ids or self.drained:
            raise ConfigError("the prompt is empty")
        self.requests.append((request, deadline_s))
        assert self.bridge is not None
        first = RequestOutput(request.request_id, (5,), "x")
        thread = threading.Thread(target=self.bridge.take, args=([first],))  # as soon as it can
        thread.start()
        self.answers.put(thread)
        time.sleep(0.05)

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return True

    def drain(self, timeout_s: float) -> None:
        self.drained.append(timeout_s)

    def stop(self) -> None:
        self.stopped.set()

    def stats(self) -> EngineStats:
        slots, stages = (SlotState("a/0", "decode", 7, 2),), (StageReport(0, 0, 1.0, 2.0, 3.0, 4.0),)
        return EngineStats(running=1, slots=slots, stages=stages)


class Wired:
    """A bridge whose HTTP process is this test."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            settings = ServerSettings(engine_socket=f"{folder}/s", supervised=True)
            listener.bind(settings.engine_socket)
            listener.listen()
            greeting = threading.Thread(target=self._greet, args=(listener, settings.fingerprint()))
            greeting.start()
            http = HttpProcess(settings)
            http.connect()
            greeting.join()
        self.engine = FakeEngine()
        self.bridge = self.engine.bridge = EngineBridge(http, self.engine, 3.0)  # type: ignore[arg-type]
        self.bridge.start()

    def _greet(self, listener: socket.socket, fingerprint: str) -> None:
        self._ours, _ = listener.accept()
        self._ours.settimeout(10)
        self._stream = self._ours.makefile("rb")
        self.send(kind="welcome", settings=fingerprint)

    def send(self, **message: Any) -> None:
        """To rank 0."""
        self._ours.sendall(pack(message))  # type: ignore[arg-type]

    def submit(self, name: str, *prompt: int, **params: Any) -> None:
        """A request."""
        self.send(kind="submit", id=name, prompt=list(prompt), params=params, deadline_s=2.5)

    def next(self, *kinds: str) -> dict[str, Any]:
        """The next message of one of these kinds."""
        while (message := receive(self._stream))["kind"] not in kinds:
            pass
        return message  # type: ignore[no-any-return]

    def hang_up(self) -> None:
        """End as a process would."""
        self._ours.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wired() -> Iterator[Wired]:
    """Wired, and its threads ended afterwards."""
    one = Wired()
    yield one
    one.bridge.close()
    one.hang_up()


def test_a_request_arrives_as_it_was_sent_and_is_accepted_before_its_first_output(wired: Wired) -> None:
    wired.submit("a/0", 1, 2, temperature=0.5, stop=["x"], logit_bias=[[3, -1.5]])
    assert wired.next("accepted", "step") == {"kind": "accepted", "id": "a/0"}
    assert wired.next("accepted", "step")["outputs"][0]["tokens"] == [5]
    ((request, deadline_s),) = wired.engine.requests
    assert (request.request_id, request.prompt_ids, deadline_s) == ("a/0", (1, 2), 2.5)
    assert (request.params.temperature, request.params.stop, request.params.logit_bias) == (0.5, ("x",), ((3, -1.5),))


@pytest.mark.parametrize(
    ("prompt", "params", "code"),
    [((), {}, "invalid"), ((13,), {}, "queue_full"), ((1,), {"temperature": -1.0}, "invalid")],
)
def test_a_refused_request_is_rejected_with_its_reason(
    wired: Wired, prompt: tuple[int, ...], params: dict[str, Any], code: str
) -> None:
    wired.submit("a/0", *prompt, **params)
    rejected = wired.next("accepted", "rejected")
    assert (rejected["kind"], rejected["id"], rejected["code"]) == ("rejected", "a/0", code) and rejected["message"]


def test_the_outputs_of_an_operation_are_one_message_with_all_their_fields(wired: Wired) -> None:
    logprobs = (TokenLogprobs(5, -0.5, ((5, -0.5), (6, -1.0))),)
    times = RequestTimes(10.0, 10.5, 11.0, 12.0)
    outputs = [
        RequestOutput("a/0", (5, 6), "ab", logprobs, (None, *logprobs), FinishReason.STOP, "END", None, 9, 4, times),
        RequestOutput("b/1", (), "", finish_reason=FinishReason.ERROR, error="lost", prompt_tokens=2),
    ]
    wired.bridge.take(outputs)
    message = wired.next("step")
    assert message["outputs"] == [
        {
            "id": "a/0", "tokens": [5, 6], "text": "ab", "logprobs": [[5, -0.5, [[5, -0.5], [6, -1.0]]]],
            "prompt_logprobs": [None, [5, -0.5, [[5, -0.5], [6, -1.0]]]], "finish": "stop", "stop": "END",
            "error": None, "prompt_tokens": 9, "cached_tokens": 4,
            "times": {"admitted": 0.5, "first_token": 1.0, "finished": 2.0},
        },
        {
            "id": "b/1", "tokens": [], "text": "", "logprobs": None, "prompt_logprobs": None, "finish": "error",
            "stop": None, "error": "lost", "prompt_tokens": 2, "cached_tokens": 0,
            "times": {"admitted": None, "first_token": None, "finished": None},
        },
    ]  # fmt: skip


def test_statistics_come_with_outputs_at_most_ten_times_a_second_and_alone_while_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge_module, "IDLE_STATS_S", 0.2)
    wired = Wired()
    first, second = wired.next("stats"), wired.next("stats")
    assert first == second and first["slots"] == [{"request_id": "a/0", "phase": "decode", "position": 7, "cached": 2}]
    assert first["stages"][0]["send_s"] == 4.0
    begin = time.monotonic()
    for _ in range(20):
        wired.bridge.take([RequestOutput("a/0", (5,), "x")])
        time.sleep(0.02)
    duration_s = time.monotonic() - begin
    with_stats = [wired.next("step")["stats"] is not None for _ in range(20)]
    assert 2 <= sum(with_stats) <= duration_s / 0.1 + 1
    wired.bridge.close()
    wired.hang_up()


def test_a_drain_refuses_and_counts_what_was_cut_off_but_not_what_a_client_has_cancelled(wired: Wired) -> None:
    wired.send(kind="cancel", id="a/0")
    wired.submit("c/0", 1)
    wired.next("accepted")
    assert wired.engine.cancelled == ["a/0"]
    wired.bridge.drain()
    assert wired.next("state")["state"] == "draining" and wired.engine.drained == [3.0]
    wired.submit("d/0", 1)
    assert wired.next("rejected")["code"] == "not_serving"
    ends = [RequestOutput(name, finish_reason=FinishReason.CANCELLED) for name in ("a/0", "c/0")]
    wired.bridge.take(ends)
    assert wired.bridge.cut_off == 1


def test_without_the_http_process_the_engine_stops_and_outputs_go_nowhere(wired: Wired) -> None:
    wired.hang_up()
    assert wired.engine.stopped.wait(10)
    wired.bridge.take([RequestOutput("a/0", (5,), "x")])
    assert isinstance(wired.bridge.lost, HttpProcessError)


def test_an_http_process_that_ends_says_why_and_one_that_sends_nonsense_ends_the_engine_too() -> None:
    wired = Wired()
    wired.send(kind="stop", reason="the template is broken")
    assert wired.engine.stopped.wait(10)
    assert isinstance(wired.bridge.lost, ConfigError) and str(wired.bridge.lost) == "the template is broken"
    wired = Wired()
    wired.send(kind="stop", reason="")  # no fault of the settings: the supervisor starts both again
    assert wired.engine.stopped.wait(10) and isinstance(wired.bridge.lost, HttpProcessError)
    wired = Wired()
    wired.send(kind="submit", id="a/0")
    assert wired.engine.stopped.wait(10) and "a message failed" in str(wired.bridge.lost)
