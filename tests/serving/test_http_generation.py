"""What happens between a request and the engine: order of events, failures, clients that leave or do not read."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving.scripted_engine import LIMIT_S, HttpServer, ScriptedEngine, events, made_output, scored, serving

BODY = {"prompt": "Hi", "max_tokens": 8}


@pytest.fixture
def engine(server: HttpServer) -> Iterator[ScriptedEngine]:
    """The engine of `server`, driven by the test."""
    server.engine.automatic = False
    yield server.engine
    server.engine.automatic = True
    assert server.engine.messages.empty(), "every message was expected"


def start(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> Future[httpx.Response]:
    """A request in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(http.post, path, json=BODY | body)
    finally:
        pool.shutdown(wait=False)


def raw_request(server: HttpServer, path: str = "/v1/completions", **body: Any) -> socket.socket:
    """A connection on which a request was sent."""
    content = json.dumps(BODY | body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.settings.port), LIMIT_S)
    connection.sendall(head.encode() + content)
    return connection


def test_a_stream_begins_with_the_first_token(server: HttpServer, http: httpx.Client, engine: ScriptedEngine) -> None:
    """Benchmarks measure the time to the first chunk, so that nothing comes before the prompt was processed."""
    connection = raw_request(server, "/v1/chat/completions", stream=True, messages=[{"role": "user", "content": "x"}])
    request = engine.next("submit")
    engine.accept(request)
    stream = connection.makefile("rb")
    head = b"".join(iter(stream.readline, b"\r\n"))
    assert head.startswith(b"HTTP/1.1 200")
    assert b"text/event-stream" in head
    connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        connection.recv(1, socket.MSG_PEEK)
    connection.settimeout(LIMIT_S)
    engine.output(request, [104], "h", finish="length")
    rest = b""
    while b"[DONE]" not in rest:
        rest += connection.recv(65536)
    assert rest.index(b'"role":"assistant"') < rest.index(b'"content":"h"')
    connection.close()


def test_a_chunk_for_each_token_also_while_text_is_held_back(http: httpx.Client, engine: ScriptedEngine) -> None:
    future = start(http, stream=True, logprobs=0)
    request = engine.next("submit")
    engine.accept(request)
    for token, text in ((195, ""), (169, "é"), (97, "a")):
        engine.output(request, [token], text, logprobs=[scored(token, 0)])
    engine.output(request, [256], "", logprobs=[scored(256, 0)], finish="stop")
    choices = [chunk["choices"][0] for chunk in events(future.result().text)[:-1]]
    assert [choice["text"] for choice in choices] == ["", "é", "a", ""]
    logprobs = [choice["logprobs"] for choice in choices]
    assert [one["tokens"] for one in logprobs] == [["bytes:\\xc3"], ["bytes:\\xa9"], ["a"], ["<|endoftext|>"]]
    assert [one["text_offset"] for one in logprobs] == [[0], [0], [1], [2]]


def test_half_characters_of_a_chat_have_their_bytes(http: httpx.Client, engine: ScriptedEngine) -> None:
    messages = [{"role": "user", "content": "x"}]
    future = start(http, "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=1)
    request = engine.next("submit")
    engine.accept(request)
    tokens = list("é".encode())
    engine.output(request, tokens, "é", logprobs=[scored(token, 1) for token in tokens], finish="length")
    entries = future.result().json()["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in entries] == [("\ufffd", [195]), ("\ufffd", [169])]


def test_a_log_probability_of_minus_infinity_is_json(http: httpx.Client, engine: ScriptedEngine) -> None:
    future = start(http, logprobs=1)
    request = engine.next("submit")
    engine.accept(request)
    engine.output(request, [97], "a", logprobs=[[97, float("-inf"), [[98, 0.0]]]], finish="length")
    (choice,) = future.result().json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -9999.0, "b": 0.0}]


@pytest.mark.parametrize(
    ("finish", "stop", "expected"),
    [("stop", "END", ("stop", "END")), ("stop", 256, ("stop", 256)), ("cancelled", None, ("abort", None))],
)
def test_why_a_choice_ended(
    http: httpx.Client, engine: ScriptedEngine, finish: str, stop: Any, expected: tuple[str, Any]
) -> None:
    future = start(http)
    request = engine.next("submit")
    engine.accept(request)
    engine.output(request, [97], "a", finish=finish, stop=stop)
    (choice,) = future.result().json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == expected


@pytest.mark.parametrize(("code", "status"), [("queue_full", 429), ("not_serving", 503), ("invalid", 400)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_rejection_is_the_status_of_the_answer(
    http: httpx.Client, engine: ScriptedEngine, code: str, status: int, stream: bool
) -> None:
    future = start(http, stream=stream, n=2)
    first, second = engine.next("submit"), engine.next("submit")
    engine.accept(first)
    message = f"request {second['id']!r}: no place"
    engine.send({"kind": "rejected", "id": second["id"], "code": code, "message": message})
    answer = future.result()
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert message == "no place" if status == 400 else "no place" in message
    assert ("retry-after" in answer.headers) == (status != 400)
    assert engine.next("cancel")["id"] == first["id"], "no choice is generated for no one"


@pytest.mark.parametrize(("finish", "status"), [("error", 503), ("timeout", 504)])
def test_a_failure_of_the_engine(http: httpx.Client, engine: ScriptedEngine, finish: str, status: int) -> None:
    future = start(http)
    request = engine.next("submit")
    engine.accept(request)
    engine.output(request, [97], "a")
    engine.output(request, [], "", finish=finish, error="rank 1 has ended" if finish == "error" else None)
    answer = future.result()
    assert answer.status_code == status
    assert ("rank 1 has ended" in answer.text) == (finish == "error")
    assert ("retry-after" in answer.headers) == (finish == "error"), "the engine may be started again"
    assert (answer.headers.get("x-should-retry") == "false") == (finish == "timeout")


def test_an_error_after_the_head_is_an_event(server: HttpServer, engine: ScriptedEngine) -> None:
    def drive() -> None:
        request = engine.next("submit")
        engine.accept(request)
        engine.output(request, [97], "a")
        engine.output(request, [], "", finish="error", error="rank 1 is gone")  # the token before it is not lost

    thread = threading.Thread(target=drive)
    thread.start()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="tiny", prompt="x", stream=True)
    assert next(stream).choices[0].text == "a"
    with pytest.raises(openai.APIError, match="rank 1 is gone"):
        next(stream)
    thread.join()


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_all_its_choices(
    server: HttpServer, engine: ScriptedEngine, phase: str, stream: bool
) -> None:
    before = server.metrics().get("stagdist:http_requests_client_disconnected_total", 0)
    connection = raw_request(server, stream=stream, n=2)
    requests = [engine.next("submit"), engine.next("submit")]
    for request in requests if phase != "queue" else ():
        engine.accept(request)
        if phase == "decode":
            engine.output(request, [97], "a")
    connection.close()
    assert [engine.next("cancel")["id"] for _ in requests] == [request["id"] for request in requests]
    engine.output(requests[0], [98], "b", finish="cancelled")  # was under way; no one takes it
    assert server.metrics()["stagdist:http_requests_client_disconnected_total"] == before + 1


def test_a_finished_choice_is_not_cancelled(server: HttpServer, engine: ScriptedEngine) -> None:
    connection = raw_request(server, n=2, stream=True)
    first, second = engine.next("submit"), engine.next("submit")
    engine.accept(first)
    engine.accept(second)
    engine.output(first, [97], "a", finish="length")
    received = b""
    while b'"length"' not in received:
        received += connection.recv(65536)
    connection.close()
    assert engine.next("cancel")["id"] == second["id"]


def test_a_client_that_does_not_read_is_given_up(server: HttpServer, engine: ScriptedEngine) -> None:
    connection = raw_request(server, stream=True, max_tokens=200)
    request = engine.next("submit")
    engine.accept(request)
    output = made_output(request, [97], "a" * 4096)
    sent = 0
    while engine.messages.empty():
        engine.send({"kind": "step", "outputs": [output] * 64, "stats": None})
        sent += 64
        assert sent < 65536, "256 MiB were taken for a client that reads nothing"
    assert engine.next("cancel")["id"] == request["id"]
    connection.close()


def test_choices_share_one_step(http: httpx.Client, engine: ScriptedEngine) -> None:
    future = start(http, n=3, stream=True)
    requests = [engine.next("submit") for _ in range(3)]
    for request in requests:
        engine.accept(request)
    for finish in (None, "length"):
        outputs = [made_output(request, [97], "a", finish=finish) for request in requests]
        engine.send({"kind": "step", "outputs": outputs, "stats": None})
    choices = [chunk["choices"][0] for chunk in events(future.result().text)[:-1]]
    assert sorted((choice["index"], choice["finish_reason"] or "") for choice in choices) == [
        (index, finish) for index in range(3) for finish in ("", "length")
    ]


def test_a_full_queue_is_noticed_before_the_body_is_read(tmp_path: Path) -> None:
    """A request that cannot be taken costs no tokenizing."""
    with serving(tmp_path, max_queued_requests=1) as server, server.client() as http:
        server.engine.automatic = False
        waiting = [raw_request(server) for _ in range(3)]  # two slots and one place in the queue
        requests = [server.engine.next("submit") for _ in waiting]
        answer = http.post("/v1/completions", content=b"no JSON", headers={"content-type": "application/json"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "RateLimitError"
        server.engine.accept(requests[0])
        server.engine.output(requests[0], [97], "a")  # it runs, so that there is a place again
        for connection in waiting[1:]:
            connection.close()
        assert {server.engine.next("cancel")["id"] for _ in (1, 2)} == {request["id"] for request in requests[1:]}
        server.engine.automatic = True
        assert http.post("/v1/completions", json=BODY).status_code == 200
        waiting[0].close()
