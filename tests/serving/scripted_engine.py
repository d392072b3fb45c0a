"""An engine that follows a script, on the other end of the Unix socket of a real HTTP process."""

import contextlib
import json
import os
import queue
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

from stagdist.data.tokenizer import byte_tokenizer
from stagdist.serving.protocol import pack, receive
from stagdist.serving.settings import ServerSettings
from tests.ranks import ROOT, Script, end_processes, fork_script

MODULE = ROOT / "stagdist" / "serving" / "http_process.py"
LIMIT_S = 30
CONTEXT, SLOTS, VOCABULARY = 200, 2, 257
LETTERS = b"abcdefghij"

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def hello(**tokenizer: Any) -> dict[str, Any]:
    """The first message of an engine with a byte tokenizer."""
    content = {"json": byte_tokenizer().to_json(), "end_token": "<|endoftext|>", "chat_template": TEMPLATE}
    model = {
        "names": ["tiny", "alias"],
        "path": "/models/tiny-model",
        "created": 1700000000,
        "max_context": CONTEXT,
        "vocab_size": VOCABULARY,
        "sections": 2,
        "stages": 2,
        "tensor": 1,
        "slots": SLOTS,
        "parameters": 1234,
        "precision": "fp32",
        "weights": "fp32",
        "version": "0.1.0",
        "connection": "staggered",
        "stagger": 1,
        "recurrent": False,
    }
    special = {"eos_token": "<|endoftext|>"}
    tokens = content | {"special_tokens": special} | tokenizer
    return {"kind": "hello", "model": model, "tokenizer": tokens}


def stats(**changes: Any) -> dict[str, Any]:
    """Numbers of an idle engine."""
    slot = {"request_id": None, "phase": "free", "position": 0, "cached": 0}
    stage = {"rank": 0, "stage": 0, "compute_s": 1.5, "wait_memory_s": 0.25, "wait_token_s": 0.5, "send_s": 0.125}
    return {
        "running": 0,
        "waiting": 0,
        "waiting_tokens": 0,
        "steps": 12,
        "operations": 15,
        "slots": [slot] * SLOTS,
        "positions_used": 40,
        "prompt_tokens_total": 100,
        "generation_tokens_total": 50,
        "prefix_queries_total": 100,
        "prefix_hits_total": 30,
        "step_s": 0.008,
        "stages": [stage],
    } | changes


def scored(token: int, top: int) -> list[Any]:
    """A token with log-probabilities that follow from its id; it is the likeliest one if its id is even."""
    own = -0.5 if token % 2 == 0 else -2.5
    others = [[(token + 1 + number) % VOCABULARY, -1.0 - number] for number in range(top)]
    return [token, own, sorted([[token, own], *others], key=lambda pair: -pair[1])[:top]]


class ScriptedEngine:
    """Rank 0 as the HTTP process sees it.

    Attributes:
        automatic: answer each request at once; otherwise a test takes messages with `next` and sends what it wants.
    """

    def __init__(self, path: str, first: dict[str, Any] | None = None, *, automatic: bool = True) -> None:
        self.automatic = automatic
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.submitted: list[dict[str, Any]] = []
        self._socket = connected(path)
        self._lock = threading.Lock()
        self._stream = self._socket.makefile("rb")
        self.welcome = receive(self._stream)
        self.send(first or hello())
        self.send({"kind": "state", "state": "ready", "reason": ""})
        self.send({"kind": "stats", **stats()})
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; from any thread."""
        self.send_bytes(pack(message))  # type: ignore[arg-type]

    def send_bytes(self, data: bytes) -> None:
        """Send what may be no message."""
        with self._lock:
            self._socket.sendall(data)

    def next(self, kind: str) -> dict[str, Any]:
        """The next message, which has to be of this kind."""
        message = self.messages.get(timeout=LIMIT_S)
        assert message["kind"] == kind, message
        return message

    def close(self) -> None:
        """End as a process that is killed."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._stream.close()
        self._socket.close()
        self._thread.join(LIMIT_S)

    def accept(self, request: dict[str, Any]) -> None:
        """Take a request."""
        self.send({"kind": "accepted", "id": request["id"]})

    def output(self, request: dict[str, Any], tokens: list[int], text: str, **more: Any) -> None:
        """Send new tokens of a request."""
        self.send({"kind": "step", "outputs": [made_output(request, tokens, text, **more)], "stats": None})

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (message := receive(self._stream)) is not None:
                if message["kind"] == "submit":
                    self.submitted.append(message)
                if self.automatic and message["kind"] == "submit":
                    self.accept(message)
                    self._answer(message)
                else:
                    self.messages.put(message)

    def _answer(self, request: dict[str, Any]) -> None:
        """Letters until the maximum or the end of the context; log-probabilities where asked for."""
        params = request["params"]
        count, top, prompt_top = (params.get(key) for key in ("max_new_tokens", "logprobs", "prompt_logprobs"))
        count = min(128 if count is None else count, CONTEXT + 1 - len(request["prompt"]))  # the default is not sent
        prompt = None
        if prompt_top is not None:
            prompt = [None, *(scored(token, prompt_top) for token in request["prompt"][1:])]
        if count == 0:
            self.output(request, [], "", prompt_logprobs=prompt, finish="length")
        for number in range(count):
            token = LETTERS[number % len(LETTERS)]
            more: dict[str, Any] = {} if number else {"prompt_logprobs": prompt}
            more["finish"] = "length" if number == count - 1 else None
            if top is not None:
                more["logprobs"] = [scored(token, top)]
            self.output(request, [token], chr(token), **more)


def made_output(request: dict[str, Any], tokens: list[int], text: str, **more: Any) -> dict[str, Any]:
    """An output of a request."""
    finished = 0.3 if more.get("finish") else None
    return {
        "id": request["id"],
        "tokens": tokens,
        "text": text,
        "logprobs": None,
        "prompt_logprobs": None,
        "finish": None,
        "stop": None,
        "error": None,
        "prompt_tokens": len(request["prompt"]),
        "cached_tokens": 3,
        "times": {"admitted": 0.1, "first_token": 0.2, "finished": finished},
    } | more


def connected(path: str) -> socket.socket:
    """A connection to a process that listens soon."""
    until = time.monotonic() + LIMIT_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            connection.settimeout(None)
            return connection
        except OSError:
            connection.close()
            assert time.monotonic() < until, "the HTTP process does not listen"
            time.sleep(0.02)


class Fork:
    """A script in a fork of the server of `tests.ranks`, which has imported what takes long; as `subprocess.Popen`."""

    def __init__(self, path: Path, given: Path, log: Path):
        (self._process,) = fork_script(Script(path, (), ROOT, log, log, given), None)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Exit code of a process that ends in this time."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"process {self.pid} still runs"
        return self._process.exitcode

    def kill(self) -> None:
        """End it."""
        end_processes([self._process])


class HttpServer:
    """A real HTTP process; `engine` is the scripted one.

    Args:
        fresh: start a new interpreter, where memory or the command line of the process matter; else a fork.
        settings: of the process, except its port and socket.
    """

    process: "Fork | subprocess.Popen[bytes]"

    def __init__(
        self,
        folder: Path,
        *,
        first: dict[str, Any] | None = None,
        connect: bool = True,
        fresh: bool = False,
        **settings: Any,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Paths of Unix sockets are short.
        self._folder = tempfile.TemporaryDirectory(prefix="http-")
        path = f"{self._folder.name}/engine"
        self.settings = ServerSettings(port=port, engine_socket=path, **settings)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"http-{port}.log"
        given = Path(self._folder.name) / "settings"
        given.write_text(self.settings.model_dump_json())
        if fresh:
            with self.log.open("wb") as log, given.open("rb") as stream:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "stagdist.serving.http_process"],
                    stdin=stream, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                )  # fmt: skip
        else:
            self.process = Fork(MODULE, given, self.log)
        if connect:
            self.engine = ScriptedEngine(path, first)
            self.wait_for("ok")

    def client(self, **more: Any) -> httpx.Client:
        """An HTTP client of the server."""
        return httpx.Client(base_url=self.url, timeout=LIMIT_S, trust_env=False, **more)

    def wait_for(self, status: str) -> dict[str, Any]:
        """Wait until /health has this status."""
        until = time.monotonic() + LIMIT_S
        with self.client() as client:
            while time.monotonic() < until:
                with contextlib.suppress(httpx.TransportError):
                    body = client.get("/health").json()
                    if body["status"] == status:
                        return dict(body)
                time.sleep(0.02)
        raise AssertionError(f"{self.log.read_text()}\n/health is not {status}")

    def metrics(self) -> dict[str, float]:
        """Sum of each metric over its labels."""
        from prometheus_client.parser import text_string_to_metric_families

        with self.client() as client:
            families = text_string_to_metric_families(client.get("/metrics").text)
            found: dict[str, float] = {}
            for family in families:
                for sample in family.samples:
                    found[sample.name] = found.get(sample.name, 0) + sample.value
            return found

    def close(self) -> None:
        """End the process."""
        if hasattr(self, "engine"):
            self.engine.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT_S)
        self._folder.cleanup()


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[HttpServer]:
    """A server with a scripted engine; arguments of `HttpServer`."""
    server = HttpServer(folder, **settings)
    try:
        yield server
    finally:
        server.close()


def events(text: str) -> list[Any]:
    """The data of server-sent events; the last one is `[DONE]`."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line]
    return [json.loads(one) for one in data[:-1]] + data[-1:]
