"""Running the server: keys, limits, ids, logs, headers, paths behind a proxy."""

import asyncio
import gzip
import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.responses import PlainTextResponse

from stagdist.errors import ConfigError
from stagdist.serving.http.middleware import RequestMiddleware
from stagdist.serving.http.server_metrics import ServerMetrics
from stagdist.serving.http_process import bound_socket, serve
from stagdist.serving.settings import ServerSettings
from tests.serving.scripted_engine import LIMIT_S, ROOT, HttpServer, serving

BODY = {"prompt": "a secret prompt", "max_tokens": 2}
KEYS = ("first-key", "zweiter-schlüssel")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """A server with keys, a prefix of paths, CORS, and small limits."""
    with serving(
        tmp_path_factory.mktemp("guarded"),
        api_keys=KEYS,
        root_path="/llm",
        cors_origins=("https://page.example",),
        metrics_prefix="vllm:",
        max_body_bytes=65536,
        body_timeout_s=0.3,
        keep_alive_s=1,
        fresh=True,
    ) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": b"Bearer " + key.encode()}  # type: ignore[dict-item]


# ---- keys ----


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize", "/detokenize", "/tokenizer_info"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        bearer("first-key2"),
        bearer("first-ke"),
        {"authorization": "first-key"},
        {"x-api-key": "first-key"},
    ],
)
def test_a_path_that_reads_or_writes_text_needs_a_key(guarded: HttpServer, path: str, headers: dict[str, str]) -> None:
    method = "GET" if path in ("/v1/models", "/tokenizer_info") else "POST"
    with guarded.client() as http:
        answer = http.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded: HttpServer, key: str) -> None:
    with guarded.client(headers=bearer(key)) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/live", "/version", "/metrics", "/slots", "/openapi.json"])
def test_probes_need_no_key(guarded: HttpServer, path: str) -> None:
    with guarded.client() as http:
        assert http.get(path).status_code == 200


def test_the_openai_package_reports_a_wrong_key(guarded: HttpServer) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_key_of_another_path_is_of_no_use(guarded: HttpServer) -> None:
    """The path that is checked is the one that is served."""
    with guarded.client() as http:
        for path in (
            "//v1/models",
            "/llm/v1/models",
            "/llm//v1/models",
            "/%761/models",
            "/health/../v1/models",
            "/V1/models",
        ):
            assert http.get(path).status_code in (401, 404), path


# ---- bodies ----


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [65537, 600_000])
def test_a_large_body_is_refused(guarded: HttpServer, chunked: bool, size: int) -> None:
    body = b'{"prompt": "' + b"x" * (size - 14) + b'"}'
    headers = bearer(KEYS[0]) | {"content-type": "application/json"}  # type: ignore[operator]
    with guarded.client() as http:
        answer = http.post("/v1/completions", content=iter([body]) if chunked else body, headers=headers)
        assert answer.status_code == 413
        assert "65536 bytes" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 200


def test_a_body_of_64_mib_ends_early(guarded: HttpServer) -> None:
    """It is not read to its end, and takes no memory."""
    with socket.create_connection(("127.0.0.1", guarded.settings.port), LIMIT_S) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {64 << 20}\r\n\r\n".encode())
        with pytest.raises(OSError):
            for _ in range(1024):
                connection.sendall(b"x" * 65536)
            connection.recv(65536)
            connection.sendall(b"x" * 65536)


def test_a_client_that_asks_first_sends_no_large_body(guarded: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", guarded.settings.port), LIMIT_S) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\nExpect: 100-continue\r\n"
        )
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {64 << 20}\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_half_a_body_times_out(guarded: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", guarded.settings.port), LIMIT_S) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        connection.sendall(f'{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"prompt'.encode())
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_half_a_head_ends_with_the_keep_alive(guarded: HttpServer, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", guarded.settings.port), LIMIT_S) as connection:
        connection.sendall(sent)
        assert connection.recv(65536) == b""


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_another_content_type_is_refused(http: httpx.Client, kind: str) -> None:
    """A page of another origin can send these without asking."""
    answer = http.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
    assert answer.status_code == 415


def test_a_compressed_body_is_refused(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = http.post("/v1/completions", content=gzip.compress(json.dumps(BODY).encode()), headers=headers)
    assert (answer.status_code, "compressed" in answer.json()["error"]["message"]) == (415, True)


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"X" * 100_000]
)
def test_what_is_no_request_gets_an_error_object(server: HttpServer, http: httpx.Client, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.settings.port), LIMIT_S) as connection:
        connection.sendall(sent)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert (head[:12], json.loads(body)["error"]["type"]) == (b"HTTP/1.1 400", "BadRequestError")
    assert http.get("/health").status_code == 200


def test_a_broken_rest_of_an_answered_request_ends_the_connection(server: HttpServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
    with socket.create_connection(("127.0.0.1", server.settings.port), LIMIT_S) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        stream = connection.makefile("rb")
        assert stream.readline().startswith(b"HTTP/1.1 415")
        connection.sendall(b"no size\r\n")
        assert b"HTTP/1.1" not in stream.read()
    assert "Traceback" not in server.log.read_text()


# ---- paths, ids, headers, log ----


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 501),
        ("POST", "/v1/responses", 501),
        ("GET", "/v1/models/gpt-5", 404),
        ("GET", "/health/", 404),
    ],
)
def test_other_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, set(answer.json())) == (status, {"error"})


def test_a_request_id_is_kept_or_made(http: httpx.Client) -> None:
    assert http.get("/live", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    made = [
        http.get("/live", headers={"x-request-id": given}).headers["x-request-id"] for given in ("", "a b", "x" * 999)
    ]
    assert len({*made}) == 3
    assert all(len(each) == 32 for each in made)
    assert http.post("/v1/completions", content=b"{").headers["x-request-id"], "errors have one too"


def test_two_requests_of_one_id_do_not_mix(server: HttpServer) -> None:
    with server.client(headers={"x-request-id": "same"}) as http:
        answers: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda count=count: answers.append(
                    http.post("/v1/completions", json=BODY | {"max_tokens": count}).json()
                )
            )  # type: ignore[misc]
            for count in (3, 5, 7)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answer["usage"]["completion_tokens"] for answer in answers) == [3, 5, 7]


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_proxy_may_remove_the_prefix_or_not(guarded: HttpServer, prefix: str) -> None:
    with guarded.client(headers=bearer(KEYS[0])) as http:
        assert http.get(f"{prefix}/v1/models").status_code == 200
        assert http.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert http.get("/other/v1/models").status_code == 404


def test_other_origins_are_refused_unless_named(guarded: HttpServer, http: httpx.Client) -> None:
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.get("/live", headers=asked).headers
    assert http.options("/v1/completions", headers=asked).status_code == 405
    with guarded.client() as allowing:
        answer = allowing.options("/v1/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-credentials" not in answer.headers
        refused = allowing.get("/v1/models", headers=asked)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")
        other = allowing.get("/live", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "name",
    ["..%2f..%2fsettings.py", "%2e%2e/settings.py", "index.html", "/etc/passwd", "%2fetc%2fpasswd", "x\x00.js"],
)
def test_no_path_leads_out_of_the_page(server: HttpServer, name: str) -> None:
    with server.client() as http:
        answer = http.get(f"/page/{name}" if "\x00" not in name else "/page/x%00.js")
    assert answer.status_code == 404


def test_headers_keep_browsers_from_guessing(http: httpx.Client) -> None:
    assert http.get("/health").headers["x-content-type-options"] == "nosniff"
    assert "server" not in http.get("/health").headers


def test_the_log_has_no_prompt_and_no_key(guarded: HttpServer) -> None:
    with guarded.client(headers=bearer(KEYS[0])) as http:
        http.post("/v1/completions?prompt=secret", json=BODY | {"stream": True}, headers={"x-request-id": "logged"})
        http.get("/a%0Ab")
    (line,) = [line for line in guarded.log.read_text().splitlines() if "id=logged" in line]
    assert "POST /llm/v1/completions 200" in line
    assert "prompt_tokens=15 completion_tokens=2" in line
    log = guarded.log.read_text()
    assert "secret" not in log
    assert KEYS[0] not in log
    assert "/a\\nb 404" in log, "no line of the log is forged"


def test_the_log_can_be_switched_off(tmp_path: Path) -> None:
    with serving(tmp_path, access_log=False) as server, server.client() as http:
        http.get("/live")
        assert server.log.read_text() == ""


# ---- the process ----


def test_the_process_imports_no_torch() -> None:
    code = "import sys, stagdist.serving.http_process; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_taken_port_is_named(server: HttpServer, tmp_path: Path) -> None:
    settings = server.settings.model_copy(update={"engine_socket": str(tmp_path / "engine")})
    command = [sys.executable, "-m", "stagdist.serving.http_process"]
    ended = subprocess.run(command, input=settings.model_dump_json().encode(), cwd=ROOT, capture_output=True)
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {settings.port}" in ended.stdout.decode()
    assert "give another --host or --port" in ended.stdout.decode()


def test_of_two_processes_that_start_at_the_same_time_one_gets_the_port() -> None:
    with bound_socket("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="cannot listen on 127.0.0.1 port"):
        bound_socket("127.0.0.1", first.getsockname()[1])  # the first one accepts nothing yet


def test_a_process_that_cannot_serve_ends() -> None:
    closed = bound_socket("127.0.0.1", 0)
    closed.close()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, pytest.raises(OSError, match="Bad file descriptor"):
        asyncio.run(asyncio.wait_for(serve(ServerSettings(engine_socket=f"{folder}/s"), closed), LIMIT_S))
    assert time.monotonic() - begin < LIMIT_S, "it ended by the limit of this test"


def test_a_log_that_cannot_be_written_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer() -> str:
        guarded = RequestMiddleware(PlainTextResponse("x"), ServerSettings(engine_socket="/s"), ServerMetrics("x:"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://a") as client:
            return (await client.get("/")).text

    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        assert asyncio.run(answer()) == "x"


def test_keys_are_not_in_the_arguments_of_the_process(guarded: HttpServer) -> None:
    arguments = Path(f"/proc/{guarded.process.pid}/cmdline").read_bytes()
    assert b"http_process" in arguments
    assert KEYS[0].encode() not in arguments
