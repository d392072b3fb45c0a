#!/usr/bin/env python3
"""Talk to a server in the terminal: `python launch/chat.py --url http://127.0.0.1:8000`. Needs no other package."""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY_VARIABLE = "STAGDIST_API_KEY"
COMMANDS = """\
/reset        forget the conversation
/save FILE    write the conversation as JSON (with --completion the text)
/help         this list
A line that ends with \\ continues on the next one. Ctrl-C stops an answer, Ctrl-D ends."""

EPILOG = f"""\
An API key is read from the environment variable {KEY_VARIABLE}, so that it is in no list of processes.
Any server with OpenAI's /v1 endpoints will do. Input that is not a terminal is read line by line, one message each.

commands in the conversation:
{COMMANDS}

examples:
  python launch/chat.py
  python launch/chat.py --url https://example.org/llm --system "Answer in one sentence." --temperature 0
  python launch/chat.py --completion --max-tokens 100

Exit code: 0 the conversation has ended; 1 the server cannot be reached, or a message from a pipe was not answered;
2 invalid arguments, a wrong API key, or a model without a chat template.
"""

UNREADABLE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading an answer raises if it is not of OpenAI's form."""


class ChatError(Exception):
    """The server refused a request, or cannot be reached; `status` is HTTP's, or 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(printable(" ".join(message.split())))
        self.status = status


@dataclass(frozen=True)
class Server:
    """Requests to one server; `url` is what its paths are appended to."""

    url: urllib.parse.SplitResult
    timeout_s: float

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            ChatError: there is none.
        """
        connection, response = self._open("GET", path, None)
        try:
            return json.load(response)
        except (ValueError, RecursionError, OSError, http.client.HTTPException) as error:
            raise ChatError(f"{self.url.geturl()}/{path} is not JSON: {error}") from error
        finally:
            connection.close()

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer. Closing the iterator closes the connection, which cancels the request.

        Raises:
            ChatError: the request was refused, or the answer breaks off.
        """
        connection, response = self._open("POST", path, json.dumps(body | {"stream": True}).encode())
        try:
            while line := response.readline():
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    return
                if data:
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ChatError(chunk["error"]["message"], 500)
                    yield chunk
            raise ChatError("the answer broke off")
        except (http.client.HTTPException, OSError) as error:
            raise ChatError(f"the connection was lost: {error}") from error
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, body: bytes | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        headers: dict[str, str | bytes] = {"Content-Type": "application/json", "User-Agent": "stagdist-chat"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = b"Bearer " + os.fsencode(key.strip())
        connection = kind(self.url.hostname or "", self.url.port, timeout=self.timeout_s)
        try:
            connection.request(method, f"{self.url.path}/{path}", body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            unknown = "CERTIFICATE_VERIFY_FAILED" in str(error)
            start = "start one with launch/serve.py, or give its address with --url"
            remedy = "if you trust it, name its certificate in SSL_CERT_FILE" if unknown else start
            raise ChatError(f"no server answers at {self.url.geturl()} ({error}); {remedy}") from error
        except ValueError:  # its text would show the key
            raise ChatError(f"the address or {KEY_VARIABLE} has characters that HTTP cannot send", 400) from None
        if response.status != 200:
            refusal = _refusal(response)
            connection.close()
            raise refusal
        return connection, response


def _refusal(response: http.client.HTTPResponse) -> ChatError:
    try:
        message = str(json.loads(response.read(100_000))["error"]["message"])
    except (*UNREADABLE, OSError, http.client.HTTPException):
        message = f"the server answered {response.status} {response.reason}"
    if response.status == 401:
        message += f"; set {KEY_VARIABLE} to a key of the server"
    if wait := response.headers.get("Retry-After"):
        message += f"; try again in {wait} s"
    return ChatError(message, response.status)


@dataclass
class Conversation:
    """What was said so far, and how the next answer is asked for.

    Attributes:
        options: fields of every request.
        completion: the model continues `text`; otherwise it answers `messages`.
    """

    server: Server
    options: dict[str, Any]
    completion: bool
    system: str | None = None
    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.text = ""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def save(self, path: Path) -> None:
        """Write what was said."""
        said = self.text if self.completion else json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
        path.write_bytes(said.encode(errors="replace"))

    def answer(self, line: str) -> str:
        """Ask for the answer to a line, print it while it arrives, and keep both. Ctrl-C keeps what has arrived.

        Returns:
            A line of figures.

        Raises:
            ChatError: there is no answer; the conversation is as before.
        """
        path = "v1/completions" if self.completion else "v1/chat/completions"
        messages = [*self.messages, {"role": "user", "content": line}]
        content: dict[str, Any] = {"prompt": self.text + line} if self.completion else {"messages": messages}
        pieces: list[str] = []
        times: list[float] = [time.perf_counter()]
        usage: dict[str, Any] = {}
        chunks = self.server.stream(path, {**self.options, **content, "stream_options": {"include_usage": True}})
        try:
            for chunk in chunks:
                usage |= chunk.get("usage") or {}
                for choice in chunk["choices"]:
                    if "role" not in (delta := choice.get("delta") or {}):  # which comes in a chunk of its own
                        times.append(time.perf_counter())
                    pieces.append(str(choice.get("text") or delta.get("content") or ""))
                    print(printable(pieces[-1]), end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except UNREADABLE as error:
            raise ChatError(f"the server sent something other than a chunk of an answer: {error!r}") from error
        finally:
            chunks.close()  # type: ignore[attr-defined]  # it is a generator
            if len(times) > 1:
                print(flush=True)
        if self.completion:
            self.text += line + "".join(pieces)
        elif pieces:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        return _figures(usage, times)


def printable(text: str) -> str:
    """Without control characters, which could change the terminal."""
    return "".join(sign for sign in text if sign in "\n\t" or (sign >= " " and not "\x7f" <= sign <= "\x9f"))


def _figures(usage: dict[str, Any], times: list[float]) -> str:
    if len(times) < 2:
        return "[nothing was generated]"
    tokens = usage.get("completion_tokens") or len(times) - 1
    facts = [f"{tokens} token{'s' * (tokens != 1)}", f"first after {1000 * (times[1] - times[0]):.0f} ms"]
    if tokens > 1 and times[-1] > times[1]:
        facts.append(f"{(tokens - 1) / (times[-1] - times[1]):.1f} tokens/s")
    if cached := (usage.get("prompt_tokens_details") or {}).get("cached_tokens"):
        facts.append(f"{cached} of {usage['prompt_tokens']} prompt tokens reused")
    return f"[{', '.join(facts)}]"


def _address(text: str) -> urllib.parse.SplitResult:
    with suppress(ValueError):
        url = urllib.parse.urlsplit(text.rstrip("/").removesuffix("/v1").rstrip("/"))
        if url.scheme in ("http", "https") and url.hostname and not set("@ ") & set(url.netloc) and url.port != 0:
            return url
    raise argparse.ArgumentTypeError(f"{text!r} is not http(s)://HOST[:PORT][/PREFIX]")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    raw, none = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS  # an error is one line, without the usage
    parser = argparse.ArgumentParser(
        prog="chat.py", usage=none, description=__doc__, epilog=EPILOG, formatter_class=raw, allow_abbrev=False
    )
    add = parser.add_argument
    add("--url", type=_address, default="http://127.0.0.1:8000", help="with or without /v1 (default %(default)s)")
    add("--model", metavar="NAME", help="name of the model (default: the first that the server has)")
    add("--system", metavar="TEXT", help="system message")
    add("--completion", action="store_true", help="continue text; for base models, which have no chat template")
    add("--max-tokens", type=int, metavar="N", help="new tokens of an answer (default: the server's)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the server's)")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K")
    add("--min-p", type=float, metavar="P")
    add("--repetition-penalty", type=float, metavar="R")
    add("--seed", type=int, metavar="N", help="the same answers every time")
    add("--stop", action="append", metavar="TEXT", help="end an answer before TEXT; may be repeated")
    add("--timeout", type=float, default=600.0, metavar="S", help="limit for a silent server (default 600)")
    parsed = parser.parse_args(arguments)
    if parsed.completion and parsed.system:
        parser.error("--system belongs to a chat; with --completion write it into the text")
    if not 0 < parsed.timeout < 1e6:
        parser.error(f"--timeout is {parsed.timeout:g}; give seconds above 0, below 1000000")
    return parsed


def connect(parsed: argparse.Namespace) -> Conversation:
    """A conversation with the server of the command line.

    Raises:
        ChatError: the server does not serve such a conversation.
    """
    server = Server(parsed.url, parsed.timeout)
    try:
        served = server.get("v1/models")["data"][0]
        model = parsed.model or served["id"]
        chats = (served.get("meta") or {}).get("chat", True)  # other servers do not say
    except UNREADABLE:
        raise ChatError(f"{parsed.url.geturl()}/v1/models lists no model; is it a server of OpenAI's API?") from None
    if not parsed.completion and not chats:
        remedy = "add --completion to continue text, or start the server with --chat-template"
        raise ChatError(f"{model} has no chat template: {remedy}", 400)
    fields = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
    options = {name: getattr(parsed, name) for name in fields if getattr(parsed, name) is not None}
    return Conversation(server, {"model": model, **options}, parsed.completion, parsed.system)


def command(conversation: Conversation, line: str) -> str:
    """Carry out a line that begins with a slash; what to print."""
    word, _, rest = line.strip().partition(" ")
    if word == "/reset":
        conversation.reset()
        return "[forgotten]"
    if word == "/save" and rest:
        try:
            conversation.save(Path(rest.strip()).expanduser())
        except (OSError, ValueError, RuntimeError) as error:  # no such path; no such home
            return f"error: cannot write {rest.strip()}: {getattr(error, 'strerror', None) or error}"
        return f"[written to {rest.strip()}]"
    return COMMANDS if word == "/help" else f"error: no command {line.strip()!r}\n{COMMANDS}"


def read_line(prompt: str) -> str:
    """A line, and those that it continues on. Raises EOFError at the end."""
    line = input(prompt)
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{input('. ' if prompt else '')}"
    return line


def converse(conversation: Conversation, terminal: bool) -> int:
    """Read and answer lines to the end; the exit code."""
    failed = 0
    while True:
        try:
            line = read_line("> " if terminal else "")
        except EOFError:
            return failed
        except KeyboardInterrupt:
            print()
            if not terminal:
                return 130
            continue
        if terminal and line.startswith("/"):
            print(command(conversation, line))
        elif line.strip():
            try:
                figures = conversation.answer(line)
                if terminal:
                    print(figures, file=sys.stderr)
            except ChatError as error:
                remedy = "; /reset forgets the conversation" if terminal and "context length" in str(error) else ""
                print(f"error: {error}{remedy}", file=sys.stderr)
                failed = 0 if terminal else 1


def main() -> int:
    """Exit code: see --help."""
    parsed = parse_arguments()
    terminal = sys.stdin.isatty()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline=None)  # type: ignore[union-attr]
    if terminal:
        import readline  # noqa: F401  # `input` edits lines with it
    try:
        conversation = connect(parsed)
        if terminal:
            print(f"{conversation.options['model']} at {parsed.url.geturl()}. /help lists commands, Ctrl-D ends.")
        return converse(conversation, terminal)
    except ChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if 400 <= error.status < 500 else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        return 141


if __name__ == "__main__":
    sys.exit(main())
