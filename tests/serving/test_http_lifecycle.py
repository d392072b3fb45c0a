"""The HTTP process over the life of the engine: loading, ready, draining, failed, hung, dead, restarted, ended."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving.scripted_engine import LIMIT_S, HttpServer, ScriptedEngine, hello, serving, stats

BODY = {"prompt": "x", "max_tokens": 2}


def ended(server: HttpServer) -> int:
    """Exit code of the HTTP process."""
    return server.process.wait(LIMIT_S)


def in_thread(function: Any) -> list[Any]:
    """Results of a function in a thread; wait with `joined`."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    results.append(thread)
    return results


def joined(results: list[Any]) -> Any:
    results[0].join(LIMIT_S)
    return results[1]


def test_requests_before_the_engine_are_refused_with_a_time(tmp_path: Path) -> None:
    server = HttpServer(tmp_path, connect=False)
    try:
        assert server.wait_for("starting")["reason"]
        with server.client() as http:
            for answer in (http.get("/health"), http.get("/v1/models"), http.post("/v1/completions", json=BODY)):
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
            assert http.get("/live").status_code == 200
            assert http.get("/metrics").status_code == 200
    finally:
        server.close()


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
def test_a_state_that_serves_no_requests(tmp_path: Path, state: str) -> None:
    with serving(tmp_path) as server, server.client() as http:
        server.engine.send({"kind": "state", "state": state, "reason": "since the test says so"})
        assert server.wait_for(state)["reason"] == "since the test says so"
        answer = http.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, state)
        assert "since the test says so" in answer.json()["error"]["message"]
        assert "retry-after" in answer.headers
        assert (answer.headers.get("connection") == "close") == (state == "draining")
        assert http.get("/health").status_code == 503
        assert http.get("/v1/models").status_code == 200, "the model is known"
        assert server.metrics()["stagdist:engine_healthy"] == 0


def test_requests_of_a_draining_server_are_finished(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as http:
        server.engine.automatic = False
        answer = in_thread(lambda: http.post("/v1/completions", json=BODY))
        request = server.engine.next("submit")
        server.engine.accept(request)
        server.engine.send({"kind": "state", "state": "draining", "reason": ""})
        server.wait_for("draining")
        server.engine.output(request, [97], "a", finish="cancelled")
        assert joined(answer).json()["choices"][0]["finish_reason"] == "abort"
        server.engine.send({"kind": "exit"})
        assert ended(server) == 0
        assert not Path(server.settings.engine_socket).exists()


def test_an_engine_that_finishes_no_operation_hangs(tmp_path: Path) -> None:
    with serving(tmp_path, hang_timeout_s=2) as server, server.client() as http:
        server.engine.automatic = False
        works, stop = threading.Event(), threading.Event()

        def beat() -> None:
            while not stop.wait(0.05):  # signs of life of a thread beside the one that hangs
                server.engine.send({"kind": "stats", **stats(running=int(works.is_set()))})

        beating = in_thread(beat)
        server.wait_for("ok")
        answer = in_thread(lambda: http.post("/v1/completions", json=BODY))
        request = server.engine.next("submit")
        server.engine.accept(request)
        works.set()
        assert server.wait_for("hung")["reason"]
        assert joined(answer).status_code == 503
        assert server.engine.next("cancel")["id"] == request["id"]
        stop.set()
        joined(beating)
        server.engine.send({"kind": "stats", **stats(running=1, operations=16)})
        server.wait_for("ok")


def test_an_engine_without_signs_of_life_hangs(tmp_path: Path) -> None:
    with serving(tmp_path, hang_timeout_s=2) as server:
        server.wait_for("hung")
        assert server.metrics()["stagdist:engine_healthy"] == 0
        server.engine.send({"kind": "stats", **stats()})
        server.wait_for("ok")


@pytest.mark.parametrize("stream", [False, True])
def test_everything_open_gets_an_error_when_the_engine_dies(tmp_path: Path, stream: bool) -> None:
    """Without a supervisor, the HTTP process ends after that."""
    with serving(tmp_path) as server:
        server.engine.automatic = False
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def ask() -> Any:
            try:
                answer = client.completions.create(model="tiny", prompt="x", stream=stream)
                return list(answer) if stream else answer
            except openai.APIError as error:
                return error

        asked = in_thread(ask)
        request = server.engine.next("submit")
        server.engine.accept(request)
        server.engine.output(request, [97], "a")
        server.engine.close()
        error = joined(asked)
        assert isinstance(error, openai.APIError), error
        assert "the engine ended before the request was finished" in str(error)
        assert ended(server) == 0


def test_a_supervised_server_waits_for_the_next_engine(tmp_path: Path) -> None:
    with serving(tmp_path, supervised=True) as server, server.client() as http:
        assert server.metrics()["stagdist:engine_healthy"] == 1
        server.engine.close()
        server.wait_for("restarting")
        answer = http.post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        server.engine = ScriptedEngine(server.settings.engine_socket)
        assert server.engine.welcome["settings"] == server.settings.fingerprint()
        server.wait_for("ok")
        assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "ab"


def test_a_supervised_server_ends_if_no_engine_comes(tmp_path: Path) -> None:
    with serving(tmp_path, supervised=True, restart_timeout_s=0.2) as server:
        server.engine.close()
        assert ended(server) == 0


def test_a_second_engine_is_turned_away(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as http:
        from stagdist.serving.protocol import receive
        from tests.serving.scripted_engine import connected

        with connected(server.settings.engine_socket) as second:
            assert receive(second.makefile("rb")) is None
        assert http.post("/v1/completions", json=BODY).status_code == 200


def test_an_engine_that_sends_nonsense_is_lost(tmp_path: Path) -> None:
    with serving(tmp_path, supervised=True) as server:
        server.engine.send_bytes(b"\xff\xff\xff\xff")
        assert "4294967295 bytes" in server.engine.next("stop")["reason"]
        assert server.wait_for("restarting")
        assert server.process.poll() is None


def test_a_tokenizer_that_cannot_be_read_is_reported_to_rank_0(tmp_path: Path) -> None:
    with serving(tmp_path, supervised=True) as server:
        server.engine.send(hello(json="{}"))
        assert "not a tokenizer.json" in server.engine.next("stop")["reason"]
        assert server.wait_for("restarting")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_for_rank_0(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as server, server.client() as http:
        os.kill(server.process.pid, number)
        assert http.post("/v1/completions", json=BODY).status_code == 200
        server.engine.send({"kind": "exit"})
        assert server.engine.next("stop")
        assert ended(server) == 0


def test_open_connections_do_not_keep_the_server(tmp_path: Path) -> None:
    """Pages listen for ever."""
    with serving(tmp_path) as server, server.client() as http, http.stream("GET", "/live/events") as events:
        lines = events.iter_lines()
        assert next(line for line in lines if line.startswith("data"))
        server.engine.send({"kind": "exit"})
        assert ended(server) == 0


def test_a_listener_sees_each_state(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as http, http.stream("GET", "/live/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        data = (line for line in events.iter_lines() if line.startswith("data: "))
        assert '"state": "ready"' in next(data)
        server.engine.send({"kind": "stats", **stats(running=2, waiting=5)})
        assert '"waiting": 5' in next(data)
        server.engine.send({"kind": "state", "state": "draining", "reason": "bye"})
        assert '"state": "draining"' in next(data)


def test_connections_are_kept(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as http:
        ports = set()
        for path in ("/health", "/nothing", "/v1/models"):
            answer = http.get(path)
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        with pytest.raises(httpx.HTTPStatusError):
            http.post("/v1/completions", json={}).raise_for_status()
        assert len(ports) == 1
