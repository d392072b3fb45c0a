"""Answers: complete ones, and server-sent events. A client that leaves ends its request in both."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stagdist.serving.api.prepared import PreparedRequest, join_wire_outputs
from stagdist.serving.api.problems import ProblemError
from stagdist.serving.http.generation import TextGeneration
from stagdist.serving.protocol import Output

Result = TypeVar("Result")

EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Proxies must pass on each event."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

_LARGE_ANSWER = 1000
"""Tokens of an answer that is written in a thread."""


class ClientGoneError(Exception):
    """The client closed its connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Await something for a client whose request was read completely.

    Raises:
        ClientGoneError: the client left before.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, written as they come.

    Args:
        events: pieces of the stream; what is left is closed when the client goes.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=EVENT_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and all events.

        Raises:
            ClientGoneError: the client left before the end.
        """
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await unless_gone(receive, self._send_events(send))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for piece in events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})


async def complete_answer(prepared: PreparedRequest, generation: TextGeneration) -> bytes:
    """The answer of a request as JSON, when all choices have ended.

    Raises:
        ProblemError: one of them failed.
    """
    outputs: list[list[Output]] = [[] for _ in prepared.submissions]
    async for batch in generation.outputs():
        for index, output in batch:
            outputs[index].append(output)

    def write() -> bytes:
        choices = [
            writer.complete(join_wire_outputs(parts)) for writer, parts in zip(prepared.writers, outputs, strict=True)
        ]
        usage = prepared.usage(generation.tokens, generation.cached)
        return _json({**prepared.head(chunk=False), "choices": choices, "usage": usage})

    scored = sum(len(each.prompt) for each in prepared.submissions) if generation.scores_prompts else 0
    large = sum(generation.tokens) + scored > _LARGE_ANSWER
    return await asyncio.to_thread(write) if large else write()


async def answer_events(prepared: PreparedRequest, generation: TextGeneration) -> AsyncGenerator[bytes, None]:
    """Chunks of a request as server-sent events; an error after the head is an event too."""
    options = prepared.fields.stream_options
    with_usage = bool(options and options.include_usage)
    always = with_usage and bool(options and options.continuous_usage_stats)
    head = _json(prepared.head(chunk=True))[:-1] + b',"choices":'  # the same in all chunks

    def usage() -> bytes:
        return b',"usage":' + _json(prepared.usage(generation.tokens, generation.cached))

    try:
        async for batch in generation.outputs():
            chunks = [chunk for index, output in batch for chunk in prepared.writers[index].chunks(output)]
            end = (usage() if always else b"") + b"}\n\n"
            yield b"".join(b"data: " + head + _json([chunk]) + end for chunk in chunks)
        if with_usage:
            yield b"data: " + head + b"[]" + usage() + b"}\n\n"
    except ProblemError as problem:
        yield b"data: " + problem.body() + b"\n\n"
    finally:
        generation.cancel()
    yield b"data: [DONE]\n\n"


def _json(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()
