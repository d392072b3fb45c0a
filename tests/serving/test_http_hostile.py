"""Requests that are wrong, long or late: they are refused or wait, and others are served meanwhile."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.scripted_engine import LIMIT_S, HttpServer, serving


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","stop":"\xed\xa0\x80"}',
        b'{"prompt":"a","stop":"' + b"a" * 5000 + b'"}',
        b'{"prompt":"a","logit_bias":{"1' + b"0" * 5000 + b'":1}}',
        '{"prompt":"a"}'.encode("utf-16"),
    ],
    ids=["half a surrogate pair", "a long stop", "a long key", "UTF-16"],
)
def test_bodies_that_no_engine_could_take_are_refused(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/completions", content=body)
    assert (answer.status_code, set(answer.json())) == (400, {"error"})


def test_the_errors_of_a_long_list_take_no_memory(server: HttpServer, http: httpx.Client) -> None:
    body = b'{"tokens":[' + b'"",' * 2_000_000 + b"1]}"
    before = psutil.Process(server.process.pid).memory_info().rss
    assert "tokens.0" in http.post("/detokenize", content=body).json()["error"]["message"]
    assert psutil.Process(server.process.pid).memory_info().rss - before < 300 << 20


def test_others_are_answered_while_a_long_text_is_encoded(server: HttpServer, http: httpx.Client) -> None:
    """Encoding it takes seconds."""
    text, worst = "a b" * 500_000, 0.0
    thread = threading.Thread(target=lambda: server.client().post("/tokenize", json={"prompt": text}))
    thread.start()
    while thread.is_alive():
        begin = time.monotonic()
        assert http.get("/live").status_code == 200
        worst = max(worst, time.monotonic() - begin)
    assert worst < 1.0


def test_a_key_may_end_with_any_byte(tmp_path: Path) -> None:
    """0xA0 is a space to some."""
    with (
        serving(tmp_path, api_keys=("kà",)) as server,
        server.client(headers={"authorization": "Bearer kà".encode()}) as http,
    ):
        assert http.get("/v1/models").status_code == 200


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[HttpServer]:
    """A server that keeps idle connections for a second."""
    with serving(tmp_path, keep_alive_s=1) as server:
        yield server


def test_a_head_that_comes_byte_by_byte_has_the_same_limit(impatient: HttpServer) -> None:
    begin = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", impatient.settings.port), LIMIT_S) as connection,
        pytest.raises(OSError),
    ):
        while time.monotonic() < begin + 10:
            connection.sendall(b"G")
            time.sleep(0.2)
    assert 0.9 < time.monotonic() - begin < 5


def test_the_limit_is_for_idle_connections_only(impatient: HttpServer) -> None:
    """Also if the next request was sent before the answer to the last one."""
    first, second = (json.dumps({"stream": True, "max_tokens": count, "prompt": "a"}).encode() for count in (1, 2))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    sent = b"".join(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in (first, second))
    engine = impatient.engine
    engine.automatic = False
    with socket.create_connection(("127.0.0.1", impatient.settings.port), LIMIT_S) as connection:
        connection.sendall(sent)
        for count in (1, 2):
            request = engine.next("submit")
            engine.accept(request)
            time.sleep(1.5 * (count - 1))
            engine.output(request, [97], "a", finish="length")
        stream, ends = connection.makefile("rb"), 0
        while ends < 2:
            line = stream.readline()
            assert line
            ends += line == b"data: [DONE]\n"
