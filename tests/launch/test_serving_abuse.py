"""Hostile clients of a server of two ranks: nothing hangs or is left behind, memory and files stay as they were."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.generating import write_model
from tests.launch.hostile_clients import (
    SECRET,
    Client,
    Target,
    completes,
    leaves_at_once,
    leaves_in_its_prompt,
    leaves_its_answer,
    leaves_its_stream,
)
from tests.launch.hostile_requests import CLIENTS, WRONG_BODIES, sends_a_wrong_body
from tests.launch.serving import Served, serve
from tests.launch.serving_soak import CONTEXT, KEY, Soak

pytestmark = pytest.mark.ranks

GROWTH_MIB = 40
"""Memory that a process may gain over hundreds of clients, once it is warm."""
SLOW = ("never_reads", "sends_half_a_body", "sends_half_a_head", "reads_slowly", "all_at_once", "tokenizes_a_mebibyte")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server with keys; in the end its log is searched for what it may not hold."""
    (tmp_path / "keys").write_text(f"another\n{KEY}\n")
    model = write_model(tmp_path / "model", max_position_embeddings=CONTEXT)
    options = ["--api-key-file", str(tmp_path / "keys"), "--chat-template", "plain"]
    running = serve(tmp_path, model, *options, access_log=True).wait_ready()
    yield running
    running.run.ranks()[0].terminate()
    assert running.run.wait() == 0, running.run.text()[-2000:]
    log = running.run.text()
    assert "POST /v1/completions" in log
    assert not any(each in log for each in (SECRET, KEY, "Traceback")), log


@contextmanager
def left_clean(served: Served) -> Iterator[Target]:
    """Afterwards slots and queue are empty, and no more files are open than before."""
    soak = Soak(served, 1)
    files = {name: process.num_fds() for name, process in soak.processes.items()}
    yield Target(served.port, KEY, CONTEXT)
    assert soak.settled(files), (soak.slots(), files, soak.sample())


def test_hostile_clients_are_answered_or_cut_off_and_leave_nothing_behind(served: Served) -> None:
    for client in CLIENTS:
        if client.__name__ not in SLOW:  # type: ignore[attr-defined]
            with left_clean(served) as target:
                assert asyncio.run(client(target))
    with left_clean(served) as target:
        asyncio.run(_refused_beside_others(target))
    _check_cancelled(served, 25)


async def _refused_beside_others(target: Target) -> None:
    refused = [sends_a_wrong_body(target, name) for name in WRONG_BODIES]
    outcomes = await asyncio.gather(*refused, *(completes(target) for _ in range(10)))
    assert Counter(outcomes) == {"400": len(WRONG_BODIES), "200": 10}


def _check_cancelled(served: Served, count: int) -> None:
    """Cancel streams, requests that wait and prompts, so many at once and four times as many of each."""
    with left_clean(served) as target:
        asyncio.run(_many(leaves_its_stream, target, count, count))
        before = _memory(served)
        for client in (leaves_its_stream, leaves_at_once, leaves_in_its_prompt):
            assert asyncio.run(_many(client, target, 4 * count, count))["left"] > count
    after = _memory(served)
    assert all(after[name] < mib + GROWTH_MIB for name, mib in before.items()), (before, after)


def _memory(served: Served) -> dict[str, float]:
    processes = [served.http_process(), *served.run.ranks()]
    return {str(process.pid): process.memory_info().rss / 2**20 for process in processes}


async def _many(client: Client, target: Target, count: int, at_once: int) -> Counter[str]:
    gate = asyncio.Semaphore(at_once)

    async def one() -> str:
        async with gate:
            return await client(target)

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


@pytest.mark.slow  # the first test checks the same with fewer, some at once
def test_a_thousand_streams_that_are_cancelled_one_after_the_other(served: Served) -> None:
    with left_clean(served) as target:
        asyncio.run(_many(leaves_its_stream, target, 50, 1))
        before = _memory(served)
        assert asyncio.run(_many(leaves_its_stream, target, 1000, 1)) == {"left": 1000}
    after = _memory(served)
    assert all(after[name] < mib + GROWTH_MIB for name, mib in before.items()), (before, after)


@pytest.mark.slow  # tests/serving/test_http_generation.py checks a full queue
def test_ten_thousand_requests_at_once(served: Served) -> None:
    with left_clean(served) as target:
        for client in (completes, leaves_its_answer):
            outcomes = asyncio.run(_many(client, target, 10_000, 10_000))
            print(outcomes, _memory(served))
            assert set(outcomes) <= {"200", "429", "left"}
            assert outcomes["200"] + outcomes["left"] >= 8
    assert served.health() == 200
