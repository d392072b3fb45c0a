"""The terminal client against a scripted server, in a pseudo-terminal and with pipes."""

import http.client
import json
import os
import pty
import select
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch import chat
from tests.launch.runs import ROOT

CHAT = [sys.executable, str(ROOT / "launch" / "chat.py")]
LIMIT_S = 60.0  # of every wait; the machine may be busy
Piece = str | dict[str, Any] | None


class Scripted(ThreadingHTTPServer):
    """Answers with what a test puts into it.

    Attributes:
        answers: pieces of each streamed answer; a dict is sent as it is, None waits until the client is gone.
        refusals: (status, headers, message) of the requests before these.
        seen: bodies of the requests that were answered or refused.
        gone: set when a client has left before the end.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[list[Piece]] = []
        self.refusals: list[tuple[int, dict[str, str], str]] = []
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.chat: bool | None = None  # servers of others do not say
        self.broken = False
        self.models: Any = "own"
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request to the scripted server."""

    server: Scripted
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        if self.headers["Authorization"] == "Bearer wrong":
            return self._json(401, {"error": {"message": "this key is not known"}})
        assert self.path == "/v1/models"
        meta = {} if self.server.chat is None else {"meta": {"chat": self.server.chat}}
        self._json(200, {"data": [{"id": "tiny", **meta}]} if self.server.models == "own" else self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body | {"path": self.path})
        if self.server.refusals:
            status, headers, message = self.server.refusals.pop(0)
            return self._json(status, {"error": {"message": message}}, headers)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = self.server.answers.pop(0)
        for piece in pieces:
            if piece is None:
                return self._until_gone()
            self._send(piece if isinstance(piece, dict) else {"choices": [self._choice(piece)]})
        if not self.server.broken:
            self._send({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(pieces)}})
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _choice(self, text: str) -> dict[str, Any]:
        return {"text": text} if self.path == "/v1/completions" else {"delta": {"content": text}}

    def _until_gone(self) -> None:
        try:
            while True:
                self._send({"choices": [self._choice("")]})
                time.sleep(0.02)
        except OSError:
            self.server.gone.set()
            self.close_connection = True

    def _send(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as scripted:
        thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield scripted
        scripted.shutdown()
        thread.join()


class Terminal:
    """chat.py in a pseudo-terminal; what it prints is in `text`."""

    def __init__(self, arguments: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*CHAT, *arguments], stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "dumb"},
            # Shells start background jobs, such as these tests, with SIGINT ignored.
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def until(self, expected: str) -> str:
        """What is printed up to and including a text, since the last call."""
        deadline = time.monotonic() + LIMIT_S
        while expected not in self.text:
            assert time.monotonic() < deadline, f"no {expected!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 4096).decode().replace("\r\n", "\n")
                except OSError:  # the other end is closed
                    raise AssertionError(f"ended without {expected!r}: {self.text!r}") from None
        before, _, self.text = self.text.partition(expected)
        return before + expected

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        try:
            return self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
            os.close(self.master)


def pipe(server: Scripted, text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """chat.py with a pipe as its input."""
    command = [*CHAT, "--url", server.url, *arguments]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | environment, check=False
    )


def test_a_conversation_keeps_its_history(server: Scripted, tmp_path: Path) -> None:
    server.answers = [["Hel", "lo"], ["Fine"], ["Again"]]
    options = ["--url", f"{server.url}/v1/", "--system", "Be kind.", "--max-tokens", "8", "--temperature", "0"]
    terminal = Terminal(options)
    terminal.until("tiny at ")
    terminal.until("> ")
    terminal.type("Hi\n")
    assert "Hello\n" in terminal.until("[2 tokens, first after ")
    terminal.until("> ")
    terminal.type("How are\\\n")
    terminal.until(". ")
    terminal.type("you?\n")
    terminal.until("Fine")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path / 'said.json'}\n")
    terminal.until("[written to ")
    terminal.type("/reset\n")
    terminal.until("[forgotten]")
    terminal.type("Hi\n")
    terminal.until("Again")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    system = {"role": "system", "content": "Be kind."}
    first = [system, {"role": "user", "content": "Hi"}]
    second = [*first, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "How are\nyou?"}]
    assert [body["messages"] for body in server.seen] == [first, second, first]
    assert json.loads((tmp_path / "said.json").read_text()) == [*second, {"role": "assistant", "content": "Fine"}]
    asked = server.seen[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["stream"]) == ("tiny", 8, 0.0, True)
    assert "top_p" not in asked and asked["path"] == "/v1/chat/completions"


def test_ctrl_c_stops_an_answer_and_keeps_what_arrived(server: Scripted) -> None:
    server.answers = [["Once", None], ["Done"]]
    terminal = Terminal(["--url", server.url])
    terminal.until("> ")
    terminal.type("Tell\n")
    terminal.until("Once")
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.until("[stopped]")
    assert server.gone.wait(LIMIT_S)
    terminal.until("> ")
    terminal.type("And?\n")
    terminal.until("Done")
    terminal.until("> ")
    terminal.type("half")
    terminal.until("half")
    time.sleep(0.5)  # readline has shown the text, and then waits for more of it
    os.killpg(terminal.process.pid, signal.SIGINT)  # here it only drops the line
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert [message["content"] for message in server.seen[1]["messages"]] == ["Tell", "Once", "And?"]


def test_a_message_that_is_stopped_before_its_answer_is_forgotten(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*arguments: object) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt
        yield {}

    monkeypatch.setattr(chat.Server, "stream", stream)
    conversation = chat.connect(chat.parse_arguments(["--url", server.url]))
    assert conversation.answer("Hi") == "[nothing was generated]" and conversation.messages == []


def test_a_refused_message_is_shown_and_forgotten(server: Scripted) -> None:
    server.refusals = [(429, {"Retry-After": "3"}, "the queue is full"), (400, {}, "maximum context length is 8")]
    server.answers = [["Yes"]]
    terminal = Terminal(["--url", server.url])
    terminal.until("> ")
    terminal.type("One\n")
    terminal.until("error: the queue is full; try again in 3 s\n")
    terminal.type("All\n")
    terminal.until("error: maximum context length is 8; /reset forgets the conversation\n")
    terminal.type("Two\n")
    terminal.until("Yes")
    terminal.type("/what\n")
    terminal.until("error: no command '/what'\n/reset ")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert [body["messages"] for body in server.seen] == [
        [{"role": "user", "content": text}] for text in ("One", "All", "Two")
    ]


def test_a_pipe_is_answered_line_by_line(server: Scripted) -> None:
    server.answers = [["1"], ["2\x1b[2J", "\x07"]]
    done = pipe(server, "/a\n\nb\n", STAGDIST_API_KEY="secret")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n2[2J\n", "")
    assert [body["messages"][-1]["content"] for body in server.seen] == ["/a", "b"]
    assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize("broken", ["cut", "error"])
def test_an_answer_that_breaks_off_is_an_error(server: Scripted, broken: str) -> None:
    server.broken = True
    server.answers = [["half", {"error": {"message": "a rank has ended"}}] if broken == "error" else ["half"]]
    done = pipe(server, "a\n")
    expected = "error: a rank has ended\n" if broken == "error" else "error: the answer broke off\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "half\n", expected)


def test_a_base_model_continues_text(server: Scripted) -> None:
    server.chat = False
    refused = pipe(server, "a\n")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: tiny has no chat template: add --completion")
    server.answers = [[" b"], [" d"]]
    done = pipe(server, "a\n c\n", "--completion")
    assert (done.returncode, done.stdout) == (0, " b\n d\n")
    assert [body["prompt"] for body in server.seen] == ["a", "a b c"]


def test_what_prevents_a_conversation_is_said(server: Scripted) -> None:
    wrong = pipe(server, "a\n", STAGDIST_API_KEY="wrong")
    assert (wrong.returncode, wrong.stderr) == (
        2, "error: this key is not known; set STAGDIST_API_KEY to a key of the server\n"
    )  # fmt: skip
    nothing = pipe(server, "a\n", "--url", "http://127.0.0.1:9")
    assert nothing.returncode == 1 and "start one with launch/serve.py" in nothing.stderr
    unsent = pipe(server, "a\n", STAGDIST_API_KEY="two\nlines")
    assert unsent.returncode == 2 and unsent.stderr.count("\n") == 1 and "two" not in unsent.stderr


def test_a_certificate_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def request(*arguments: object) -> None:
        raise ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    monkeypatch.setattr(http.client.HTTPConnection, "request", request)
    with pytest.raises(chat.ChatError, match="self-signed .*name its certificate in SSL_CERT_FILE") as failed:
        chat.connect(chat.parse_arguments(["--url", "https://example.org"]))
    assert failed.value.status == 0  # a ValueError as well, but no invalid key


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--url", url] for url in ("127.0.0.1:8000", "ftp://a", "http://a:b", "http://", "http://a:70000", "http://[")),
        *(["--timeout", seconds] for seconds in ("0", "-1", "nan", "inf", "1x")),
        ["--url", "http://a b"], ["--completion", "--system", "x"], ["--max-tokens", "1x"], ["--temperature", ""],
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chat.parse_arguments(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("chat.py: error: ") and said.count("\n") == 1


@pytest.mark.parametrize("models", [None, [], {}, {"data": []}, {"data": [{}]}, {"data": ["a"]}, {"data": {"id": 1}}])
def test_a_server_of_another_kind_is_named(server: Scripted, models: Any) -> None:
    server.models = models
    done = pipe(server, "a\n")
    assert done.returncode == 1 and done.stderr == (
        f"error: {server.url}/v1/models lists no model; is it a server of OpenAI's API?\n"
    )


@pytest.mark.parametrize("piece", [{"choices": [7]}, {"choices": None}, {"choices": [{"delta": "a"}]}, {"usage": 3}])
def test_a_chunk_of_another_kind_is_an_error(server: Scripted, piece: dict[str, Any]) -> None:
    server.answers = [[piece], ["Yes"]]
    done = pipe(server, "a\nb\n")
    assert (done.returncode, done.stdout.strip()) == (1, "Yes")
    assert done.stderr.startswith("error: the server sent something other than a chunk of an answer: ")
    assert done.stderr.count("\n") == 1


def test_text_of_windows_and_bytes_that_are_no_text_from_a_pipe(server: Scripted) -> None:
    server.answers = [["1"], ["2"]]
    done = subprocess.run([*CHAT, "--url", server.url], input=b"\xef\xbb\xbfa\r\n\xff\r\n", capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"1\n2\n")
    assert [body["messages"][-1]["content"] for body in server.seen] == ["a", "\udcff"]
