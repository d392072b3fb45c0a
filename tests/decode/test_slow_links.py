"""A slow link makes steps longer, never wrong: messages that come several steps late are waited for."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from stagdist.config.parts import ModelConfig
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions
from stagdist.decode.runtime.transport import Transport
from stagdist.errors import ConfigError, TransportError
from stagdist.parallel.grid import Grid
from stagdist.parallel.slow_link import wait_until
from tests.decode.comparison import compare
from tests.decode.decoding import Case, Ran, config_of, prompt
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

COLLECTIVE_S = 0.01
DELAY_S = 0.03
"""Many steps of so small a model."""
VARIANTS: dict[str, dict[str, Any]] = {
    "stagger 1": {},
    "stagger 2": {"stagger": 2},
    "stagger 2, combined": {"stagger": 2, "combine_sections": True},
    "stagger 0": {"stagger": 0},
    "sequential": {"connection": "sequential"},
}


def cases() -> list[Case]:
    """Every variant without and with the delay."""
    requests = [
        Request(str(length), prompt(length), SamplingParams(max_new_tokens=9, temperature=0.0)) for length in (1, 11)
    ]
    return [
        Case(name, keys, requests, EngineOptions(precision="fp64", chunk_size=5, link_delay_s=delay_s))
        for name, keys in VARIANTS.items()
        for delay_s in (0.0, DELAY_S)
    ]


def tensor_parallel_case() -> Case:
    """Both ranks share every matrix, and every collective takes a latency longer."""
    options = EngineOptions(precision="fp64", tensor_parallel_size=2, link_delay_s=COLLECTIVE_S)
    request = Request("0", prompt(3), SamplingParams(max_new_tokens=5, temperature=0.0))
    return Case("tensor parallel", {"connection": "sequential"}, [request], options)


@pytest.fixture(scope="module")
def ran() -> list[list[Ran]]:
    return run_ranks("tests.decode.decoding:run_cases", 2, [*cases(), tensor_parallel_case()])


@pytest.mark.parametrize(("number", "case"), list(enumerate(cases())))
def test_tokens_stay_exact_however_late_the_messages_are(ran: list[list[Ran]], number: int, case: Case) -> None:
    compared = compare(case, [results[number] for results in ran])
    assert compared.wrong_tokens == 0 and compared.difference < 1e-9 and compared.tokens == 18


@pytest.mark.parametrize(("number", "case"), list(enumerate(cases())))
def test_a_latency_is_shared_by_the_steps_of_the_lag(ran: list[list[Ran]], number: int, case: Case) -> None:
    """A hand-off goes and its token comes back once in every lag + 1 steps; less time than that cannot pass."""
    lag = case.keys.get("stagger", 1) if case.keys.get("connection") is None else 0
    done = ran[0][number]
    # Each request ends with a partial round at most, and its first `lag` steps need no hand-off of a step.
    rounds = 2 * ((8 - lag) // (lag + 1))
    assert done.steps == 16
    assert done.seconds >= rounds * 2 * case.options.link_delay_s
    if case.options.link_delay_s == 0:
        assert done.seconds < 16 * DELAY_S, "steps are so slow here that the delay says nothing"


def test_a_step_with_stagger_waits_for_fewer_latencies_than_one_without(ran: list[list[Ran]]) -> None:
    late = [done.seconds for done, case in zip(ran[0], cases(), strict=False) if case.options.link_delay_s]
    of = dict(zip(VARIANTS, late, strict=True))
    assert of["stagger 1"] < 0.75 * of["stagger 0"] and of["stagger 2"] < 0.75 * of["sequential"]


def test_every_collective_of_tensor_parallelism_takes_a_latency(ran: list[list[Ran]]) -> None:
    case = tensor_parallel_case()
    compared = compare(case, [results[-1] for results in ran])
    assert compared.wrong_tokens == 0 and compared.difference < 1e-9
    layers = ModelConfig(**config_of(case.keys)).num_layers
    assert ran[0][-1].seconds >= 4 * (2 * layers + 1) * COLLECTIVE_S


def test_a_wait_ends_on_time() -> None:
    for wait_s in (0.0, 0.00005, 0.003):
        due_s = time.perf_counter() + wait_s
        wait_until(due_s)
        assert due_s <= time.perf_counter() < due_s + 1.0


def test_links_are_delayed_by_less_than_the_limit_of_waits() -> None:
    for delay_s in (-0.1, float("nan"), 600.0):
        with pytest.raises(ConfigError, match="link_delay_s is .*; give seconds from 0"):
            EngineOptions(link_delay_s=delay_s)


def send_to_a_silent_rank(timeout_s: float) -> str:
    """What rank 0 hears of a delayed hand-off that rank 1 never asks for."""
    dist.init_process_group("gloo")
    transport, store = Transport(Grid(2, 1, 1), "cpu", timeout_s, link_delay_s=0.05), _get_default_store()
    if transport.rank:
        store.wait(["heard"])  # there, but silent
        return ""
    transport.hand_offs_out.send(torch.zeros(1, 1, 8), in_flight=0)
    try:
        transport.finish_sends()
    except TransportError as error:
        return str(error)
    finally:
        store.set("heard", "")
    return "the hand-off left"


def test_a_delayed_hand_off_that_cannot_leave_is_an_error_and_no_endless_wait() -> None:
    heard = run_ranks("tests.decode.test_slow_links:send_to_a_silent_rank", 2, 1.0)[0]
    assert heard.startswith("stage 0 (rank 0) lost stage 1 (rank 1) in step 0 while a hand-off was in flight"), heard
