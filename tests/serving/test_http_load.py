"""Very many clients at once: each gets an answer or a clear refusal, and memory stays flat."""

import asyncio
import collections
import json
import resource
import threading
from pathlib import Path

import psutil
import pytest

from tests.serving.scripted_engine import LIMIT_S, HttpServer, serving, stats

MIB = 2**20


async def ask(port: int, answers: collections.Counter[str]) -> None:
    """One request on a connection of its own; counts the status, and whether the stream was complete."""
    body = json.dumps({"prompt": "Hello", "max_tokens": 16, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    answers[f"{answer[9:12].decode()} {'complete' if b'[DONE]' in answer else ''}".strip()] += 1


def flood(server: HttpServer, count: int) -> collections.Counter[str]:
    """Answers to `count` requests that are sent at once."""

    async def run() -> collections.Counter[str]:
        answers: collections.Counter[str] = collections.Counter()
        await asyncio.gather(*(ask(server.settings.port, answers) for _ in range(count)))
        return answers

    return asyncio.run(run())


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_all_requests_of_a_flood_are_answered(tmp_path: Path, count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with serving(tmp_path, max_queued_requests=16, access_log=False, fresh=True) as server:
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.5):
                server.engine.send({"kind": "stats", **stats()})

        beating = threading.Thread(target=beat)
        beating.start()
        process = psutil.Process(server.process.pid)
        files = process.num_fds()
        try:
            seen: list[int] = []
            for _ in range(3):
                answers = flood(server, count)
                assert answers.keys() <= {"200 complete", "429"}, answers
                assert answers.total() == count
                assert answers["200 complete"] > 0
                seen.append(process.memory_info().rss)
        finally:
            stop.set()
            beating.join(LIMIT_S)
        assert seen[-1] - seen[0] < 16 * MIB, "the second and third flood take no more memory"
        assert server.metrics()["stagdist:engine_healthy"] == 1
        assert process.num_fds() <= files + 2


def test_the_memory_for_large_texts_is_returned(tmp_path: Path) -> None:
    with serving(tmp_path, access_log=False, fresh=True) as server, server.client() as client:
        text, process, seen = "the quick brown fox " * 200_000, psutil.Process(server.process.pid), list[int]()
        for _ in range(2):
            assert client.post("/v1/completions", json={"prompt": text, "max_tokens": 1}).status_code == 400  # too long
            seen.append(process.memory_info().rss)
    assert max(seen) < 160 * MIB, "encoding one takes more than 100 MiB"


def test_pages_that_listen_are_limited(server: HttpServer) -> None:
    async def listen() -> list[bytes]:
        async def open_one() -> tuple[bytes, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.settings.port)
            writer.write(b"GET /live/events HTTP/1.1\r\nHost: x\r\n\r\n")
            return (await reader.readline())[9:12], writer

        opened = [await open_one() for _ in range(66)]
        for _, writer in opened:
            writer.close()
        return [status for status, _ in opened]

    statuses = asyncio.run(listen())
    assert statuses == [b"200"] * 64 + [b"503"] * 2
