"""Clients of a server, and those that leave or do not read; each says what came, and refuses what must not come."""

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

LIMIT_S = 120.0
"""No client waits longer for anything: whatever takes longer hangs."""

SECRET = "the-secret-prompt"
"""Begins every prompt; no log may hold it."""

PIECE = b"x" * 65536
MIB = 1 << 20


class UnexpectedError(AssertionError):
    """The server did what no client may see."""


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        key: sent with every request that is not about keys.
    """

    port: int
    key: str
    context: int
    host: str = "127.0.0.1"

    def head(
        self, path: str, length: int | None, *, method: str = "POST", more: str = "", key: str | None = None
    ) -> bytes:
        """The head of a request; without a length the body is chunked."""
        body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        auth = f"Authorization: Bearer {self.key if key is None else key}"
        lines = (
            f"{method} {path} HTTP/1.1\r\nHost: x\r\n{auth}\r\nContent-Type: application/json\r\n{body}\r\n{more}\r\n"
        )
        return lines.encode("latin-1")

    def post(self, path: str, body: bytes, **more: Any) -> bytes:
        """A complete request."""
        return self.head(path, len(body), **more) + body

    def completion(self, **fields: Any) -> bytes:
        """A complete request for text."""
        body = {"prompt": f"{SECRET} {random.random()}", "max_tokens": 8, "ignore_eos": True, **fields}
        return self.post("/v1/completions", json.dumps(body).encode())

    @asynccontextmanager
    async def connection(self, *, buffer: int | None = None) -> AsyncIterator["Connection"]:
        """A connection that is cut off at the end.

        Args:
            buffer: bytes that the client's side takes without reading.
        """
        raw = socket.socket()
        raw.setblocking(False)
        if buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        writer = None
        try:
            async with asyncio.timeout(LIMIT_S):
                await asyncio.get_running_loop().sock_connect(raw, (self.host, self.port))
            reader, writer = await asyncio.open_connection(sock=raw, limit=1024 if buffer else MIB)
            yield Connection(reader, writer)
        finally:
            if writer is None:
                raw.close()
            else:
                writer.transport.abort()


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    def error(self) -> str:
        """The message of an error, which has the form of OpenAI's API and says when to try again.

        Raises:
            UnexpectedError: it is no such error.
        """
        try:
            message = json.loads(self.body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            raise UnexpectedError(f"{self.status} without an error object: {self.body[:200]!r}") from None
        if self.status in (429, 503) and not self.headers.get("retry-after", "").isdecimal():
            raise UnexpectedError(f"{self.status} without Retry-After")
        return str(message)


@dataclass(frozen=True)
class Connection:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> bool:
        """Send; False if the server has closed the connection."""
        try:
            async with asyncio.timeout(LIMIT_S):
                self.writer.write(data)
                await self.writer.drain()
        except ConnectionError:
            return False
        return True

    async def head(self) -> Answer | None:
        """The status and the headers of a response; None if the connection was closed instead."""
        try:
            async with asyncio.timeout(LIMIT_S):
                lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        pairs = (line.partition(":") for line in lines[1:] if line)
        return Answer(int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs})

    async def pieces(self, answer: Answer) -> AsyncIterator[bytes]:
        """The body as it comes; ends early if the server cuts it off."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            if answer.headers.get("transfer-encoding") != "chunked":
                async with asyncio.timeout(LIMIT_S):
                    length = answer.headers.get("content-length")
                    yield await (self.reader.read() if length is None else self.reader.readexactly(int(length)))
                return
            while True:
                async with asyncio.timeout(LIMIT_S):
                    size = int(await self.reader.readuntil(b"\r\n"), 16)
                    piece = (await self.reader.readexactly(size + 2))[:-2]
                if not size:
                    return
                yield piece

    async def answer(self, *, head_only: bool = False) -> Answer | None:
        """The next response; None if the connection was closed instead."""
        found = await self.head()
        if found is None or head_only:
            return found
        return Answer(found.status, found.headers, b"".join([piece async for piece in self.pieces(found)]))


Client = Callable[[Target], Coroutine[Any, Any, str]]
"""A client; what it returns names the outcome."""


async def ask(target: Target, data: bytes) -> Answer:
    """The answer to one request on a connection of its own."""
    async with target.connection() as connection:
        await connection.send(data)
        answer = await connection.answer()
    if answer is None:
        raise UnexpectedError("the connection was closed without an answer")
    return answer


def expect(answer: Answer, *statuses: int) -> str:
    """The status as an outcome; errors must be clear.

    Raises:
        UnexpectedError: another status.
    """
    message = "" if answer.status == 200 else answer.error()
    if answer.status not in statuses:
        raise UnexpectedError(f"{answer.status} instead of {statuses}: {message} {answer.body[:200]!r}")
    return str(answer.status)


# --- clients that behave ----------------------------------------------------------------------------------------


async def completes(target: Target) -> str:
    """Reads its answer."""
    return expect(await ask(target, target.completion(max_tokens=random.randint(1, 24))), 200, 429)


async def streams(target: Target) -> str:
    """Reads its stream to the end."""
    count = random.randint(1, 60)
    answer = await ask(target, target.completion(max_tokens=count, stream=True))
    if answer.status == 200 and (not answer.body.endswith(b"data: [DONE]\n\n") or b'"length"' not in answer.body):
        raise UnexpectedError(f"a stream ended early: {answer.body[-300:]!r}")
    return expect(answer, 200, 429)


async def chats(target: Target) -> str:
    """Reads the answer of a conversation; what it writes is no template."""
    body = {"messages": [{"role": "user", "content": SECRET + "{{7*7}}{% for i in range(9) %}"}], "max_tokens": 8}
    return expect(await ask(target, target.post("/v1/chat/completions", json.dumps(body).encode())), 200, 429)


async def keeps_its_connection(target: Target) -> str:
    """Asks eight times, between them in other ways."""
    async with target.connection() as connection:
        for number in range(8):
            await connection.send(target.completion(max_tokens=2, stream=number % 2 == 0))
            expect(await connection.answer() or Answer(0, {}), 200, 429)
            await connection.send(target.head("/health", 0, method="HEAD"))
            head = await connection.answer(head_only=True)
            await connection.send(target.head("/v1/completions", 0, method="OPTIONS"))
            options = await connection.answer()
            if head is None or options is None or (head.status, options.status) != (200, 405):
                raise UnexpectedError(f"HEAD and OPTIONS gave {head} and {options}")
    return "served"


async def tokenizes_a_mebibyte(target: Target) -> str:
    """Asks for more tokens than any prompt may have."""
    body = json.dumps({"prompt": SECRET + "ab " * (MIB // 3)}).encode()
    return expect(await ask(target, target.post("/tokenize", body)), 200)


# --- clients that leave or do not read --------------------------------------------------------------------------


async def leaves_at_once(target: Target) -> str:
    """Leaves in the queue or at the beginning of its prompt."""
    async with target.connection() as connection:
        await connection.send(target.completion(max_tokens=target.context, stream=random.random() < 0.5))
        await asyncio.sleep(random.random() * 0.02)
    return "left"


async def leaves_in_its_prompt(target: Target) -> str:
    """Leaves while a long prompt is read, most likely."""
    async with target.connection() as connection:
        await connection.send(target.completion(prompt=f"{random.random()}" * (target.context // 30)))
        await asyncio.sleep(random.random() * 0.1)
    return "left"


async def leaves_its_stream(target: Target) -> str:
    """Leaves after some tokens."""
    async with target.connection() as connection:
        await connection.send(target.completion(max_tokens=target.context, stream=True))
        head = await connection.head()
        if head is None or head.status != 200:
            return expect(await _rest(connection, head), 429)
        rest = random.randint(1, 10)
        async for _ in connection.pieces(head):
            rest -= 1
            if not rest:
                return "left"
    raise UnexpectedError("a stream ended before its client left")


async def _rest(connection: Connection, head: Answer | None) -> Answer:
    if head is None:
        raise UnexpectedError("the connection was closed without an answer")
    return Answer(head.status, head.headers, b"".join([piece async for piece in connection.pieces(head)]))


async def leaves_its_answer(target: Target) -> str:
    """Leaves while an answer without a stream is written."""
    async with target.connection() as connection:
        await connection.send(target.completion(max_tokens=target.context))
        await asyncio.sleep(0.2 + random.random())
    return "left"


async def reads_slowly(target: Target) -> str:
    """Takes a few bytes of a stream now and then, and leaves."""
    async with target.connection(buffer=4096) as connection:
        await connection.send(target.completion(max_tokens=target.context, stream=True, logprobs=5))
        for _ in range(20):
            if not await connection.reader.read(256):
                return "cut off"
            await asyncio.sleep(0.5)
    return "left"


async def never_reads(target: Target) -> str:
    """Takes nothing of a stream until the server gives up, or for a limited time."""
    async with target.connection(buffer=4096) as connection:
        await connection.send(target.completion(max_tokens=target.context, stream=True, logprobs=5))
        await asyncio.sleep(LIMIT_S * 0.75)
        async with asyncio.timeout(LIMIT_S):
            with suppress(ConnectionError):
                while await connection.reader.read(MIB):
                    pass
                return "ended"
    return "cut off"
