"""Clients that send what no server can serve: too much, half of it, nonsense, wrong keys, everything at once."""

import asyncio
import random

from tests.launch.hostile_clients import (
    MIB,
    PIECE,
    SECRET,
    Answer,
    Client,
    Target,
    UnexpectedError,
    ask,
    chats,
    completes,
    expect,
    keeps_its_connection,
    leaves_at_once,
    leaves_in_its_prompt,
    leaves_its_answer,
    leaves_its_stream,
    never_reads,
    reads_slowly,
    streams,
    tokenizes_a_mebibyte,
)

_TEXT = SECRET.encode()
WRONG_BODIES = {
    "nothing": b"",
    "half an object": b'{"prompt": "' + _TEXT,
    "no JSON": b"prompt=" + _TEXT,
    "no object": b"[1]",
    "deep": b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep without an end": b"[" * MIB,
    "not a number": b'{"prompt":"a","temperature":NaN}',
    "invalid UTF-8": b'{"prompt":"\xff' + _TEXT + b'"}',
    "half a surrogate pair": b'{"prompt":"a","stop":"\xed\xa0\x80"}',
    "half a surrogate pair, written": b'{"prompt":"a","stop":"\\ud800"}',
    "UTF-16": '{"prompt":"a"}'.encode("utf-16"),
    "a prompt of objects": b'{"prompt":[{}]}',
    "a prompt of lists": b'{"prompt":[' + b"[]," * 300_000 + b"[]]}",
    "a prompt of many texts": b'{"prompt":[' + b'"a",' * 300_000 + b'"a"]}',
    "a long prompt": b'{"prompt":"' + _TEXT + b"a b" * 300_000 + b'"}',
    "many token ids": b'{"prompt":[' + b"1," * 500_000 + b"1]}",
    "negative token ids": b'{"prompt":[-1]}',
    "large token ids": b'{"prompt":[1' + b"0" * 300 + b"]}",
    "true as a token id": b'{"prompt":[true]}',
    "a large number": b'{"prompt":"a","temperature":1e999}',
    "a long number": b'{"prompt":"a","temperature":' + b"1" * 5000 + b"}",
    "a long key of logit_bias": b'{"prompt":"a","logit_bias":{"1' + b"0" * 5000 + b'":1}}',
    "many stops": b'{"prompt":"a","stop":[' + b'"a",' * 300_000 + b'"a"]}',
    "a long stop": b'{"prompt":"a","stop":"' + b"a" * MIB + b'"}',
    "many choices": b'{"prompt":"a","n":1000000}',
    "many logprobs": b'{"prompt":"a","logprobs":1000000}',
    "many wrong messages": b'{"messages":[' + b"1," * 500_000 + b"1]}",
    "a text as maximum": b'{"prompt":"a","max_tokens":"1"}',
    "a template": b'{"prompt":"a","chat_template":"{{ 7 * 7 }}"}',
}
"""Bodies that have to be refused."""


async def sends_a_wrong_body(target: Target, name: str | None = None) -> str:
    """Sends one of them."""
    name = name or random.choice(list(WRONG_BODIES))
    try:
        return expect(await ask(target, target.post("/v1/completions", WRONG_BODIES[name])), 400, 429)
    except UnexpectedError as error:
        raise UnexpectedError(f"{name}: {error}") from None


async def detokenizes_nonsense(target: Target) -> str:
    """Sends a mebibyte of texts as token ids."""
    body = b'{"tokens":[' + b'"",' * (MIB // 3) + b"1]}"
    return expect(await ask(target, target.post("/detokenize", body)), 400)


async def sends_too_much(target: Target, *, size: int = 64 * MIB, chunked: bool | None = None) -> str:
    """Sends 64 MiB, with a length or in chunks, until it hears an answer or is cut off."""
    chunked = random.random() < 0.5 if chunked is None else chunked
    async with target.connection() as connection:
        await connection.send(target.head("/v1/completions", None if chunked else size))
        answer = asyncio.create_task(connection.answer())
        for _ in range(size // len(PIECE)):
            piece = b"%x\r\n%s\r\n" % (len(PIECE), PIECE) if chunked else PIECE
            if answer.done() or not await connection.send(piece):
                break
        if chunked:
            await connection.send(b"0\r\n\r\n")
        found = await answer
    return "cut off" if found is None else expect(found, 413, 429)


async def sends_half_a_head(target: Target) -> str:
    """Sends half a head and leaves."""
    async with target.connection() as connection:
        await connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthoriz")
        await asyncio.sleep(5)
    return "left"


async def sends_half_a_body(target: Target) -> str:
    """Sends half a body and waits for what comes."""
    async with target.connection() as connection:
        await connection.send(target.head("/v1/completions", 1000) + b'{"prompt": "' + _TEXT)
        return expect(await connection.answer() or Answer(0, {}), 408, 429)


async def sends_many_headers(target: Target) -> str:
    """Sends 64 KiB of headers."""
    more = "".join(f"x-header-{number}: {'y' * 40}\r\n" for number in range(1000))
    async with target.connection() as connection:
        await connection.send(target.completion(max_tokens=1).replace(b"\r\n\r\n", f"\r\n{more}\r\n".encode(), 1))
        found = await connection.answer()
    if found is None:
        return "cut off"
    if found.status not in (200, 400, 429, 431):
        raise UnexpectedError(f"64 KiB of headers gave {found.status}")
    return str(found.status)


async def pipelines(target: Target) -> str:
    """Sends six requests before it reads the first answer."""
    async with target.connection() as connection:
        await connection.send(b"".join(target.completion(max_tokens=number + 1) for number in range(6)))
        for _ in range(6):
            expect(await connection.answer() or Answer(0, {}), 200, 429)
    return "served"


async def speaks_http_1_0(target: Target) -> str:
    """Asks as in 1996, and expects the end of the connection after the answer."""
    async with target.connection() as connection:
        stream = random.random() < 0.5
        await connection.send(target.completion(stream=stream).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        answer = await connection.answer()
        if answer is None or answer.headers.get("transfer-encoding") or await connection.reader.read(1):
            raise UnexpectedError(f"HTTP/1.0 gave {answer}")
    return expect(answer, 200, 429)


WRONG_KEYS = ("", "x", "\xff\xfe", "\x80" * 4000, "k\xa0", "key, key")


async def has_a_wrong_key(target: Target) -> str:
    """Sends keys that are none."""
    for key in (*WRONG_KEYS, target.key[:-1], target.key + "x", target.key.upper()):
        answer = await ask(target, target.post("/v1/completions", b"{}", key=key))
        expect(answer, 401)
    return "401"


async def wants_other_files(target: Target) -> str:
    """Asks for files outside of the page's folder."""
    for name in (
        "..%2f..%2fsettings.py",
        "%2e%2e/%2e%2e/settings.py",
        "../../../etc/passwd",
        "%2fetc%2fpasswd",
        "a%00.js",
    ):
        expect(await ask(target, target.head(f"/page/{name}", 0, method="GET")), 404)
    return "404"


async def forges_headers(target: Target) -> str:
    """Sends ids that would begin another header or line of the log."""
    for given in ("a\rSet-Cookie: b=1", "a\x85b", "x" * 200, "a%0d%0aSet-Cookie: b=1", "a b"):
        async with target.connection() as connection:
            await connection.send(
                target.completion(max_tokens=1).replace(b"\r\n", f"\r\nx-request-id: {given}\r\n".encode("latin-1"), 1)
            )
            answer = await connection.answer()
        if answer is None or answer.status == 400:
            continue
        if "set-cookie" in answer.headers or answer.headers["x-request-id"] == given:
            raise UnexpectedError(f"{given!r} gave {answer.headers}")
    return "refused"


async def all_at_once(target: Target, count: int = 400) -> str:
    """Sends many requests at the same time; what is not served is refused."""
    outcomes = await asyncio.gather(*(completes(target) for _ in range(count)))
    return f"served or refused ({count})" if outcomes else ""


CLIENTS: dict[Client, float] = {
    completes: 30, streams: 60, chats: 20, keeps_its_connection: 4, tokenizes_a_mebibyte: 1,
    leaves_at_once: 20, leaves_in_its_prompt: 20, leaves_its_stream: 40, leaves_its_answer: 10,
    reads_slowly: 4, never_reads: 2,
    sends_a_wrong_body: 20, detokenizes_nonsense: 1, sends_too_much: 2, sends_half_a_head: 4, sends_half_a_body: 2,
    sends_many_headers: 2, pipelines: 4, speaks_http_1_0: 4, has_a_wrong_key: 2, wants_other_files: 2,
    forges_headers: 2, all_at_once: 0.3,
}  # fmt: skip
"""All clients with their weight in a mixture."""
