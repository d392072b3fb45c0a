"""The hand-off between real ranks: no rank waits for a send, order and content are kept, errors name the edge."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stagdist.config.run_config import RunConfig
from stagdist.errors import TransportError
from stagdist.parallel.grid import Grid
from stagdist.training.engine.exchange import Exchange
from stagdist.training.engine.pipeline import HandOff, expected_hand_off
from stagdist.training.engine.train_schedule import TrainSchedule
from tests.ranks import GUARD_S, run_ranks

STAGES, MICRO_BATCHES, NAP_S = 3, 6, 0.6
LOST_S = 4.0
SHAPE = (2, 8, 300)
EXPECTED = HandOff(torch.empty(SHAPE, device="meta"), torch.empty(2, 8, dtype=torch.int64, device="meta"))


def config(**model: Any) -> RunConfig:
    shape = {
        "vocab_size": 11,
        "hidden_size": 300,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "section_layers": [1, 1, 1],
    }
    return RunConfig.model_validate(
        {
            "name": "exchange",
            "model": shape | model,
            "training": {"steps": 1, "global_batch_size": 12, "micro_batch_size": 2},
        }
    )


def all_cases(_: None) -> dict[str, Any]:
    """All checks in one world of three stages; returns what the tests compare."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=GUARD_S))
    exchange, plain = (
        Exchange(Grid(STAGES, 1, 1), expected, "cpu", GUARD_S) for expected in (EXPECTED, HandOff(EXPECTED.memory))
    )
    stage = dist.get_rank()
    result: dict[str, Any] = {"first": round_trip(exchange, stage), "second": round_trip(exchange, stage)}
    result["plain"] = round_trip(plain, stage)
    result["wrong_shape"] = wrong_shape(exchange, stage)
    dist.barrier()
    result["lost_peer"] = lost_peer(Exchange(Grid(STAGES, 1, 1), EXPECTED, "cpu", LOST_S), stage)
    return result


def round_trip(exchange: Exchange, stage: int) -> dict[str, Any]:
    """All micro-batches down and their gradients up; every stage adds one, and the second stage starts late."""
    dist.barrier()
    exchange.begin([one for step in TrainSchedule(MICRO_BATCHES, STAGES, stage).steps() for one in step])
    if stage == 1:
        time.sleep(NAP_S)
    started, inputs = time.perf_counter(), []
    for number in range(MICRO_BATCHES):
        hand_off = exchange.receive_activations() if stage else first(exchange, number)
        inputs.append(hand_off)
        if stage < STAGES - 1:
            exchange.send_activations(HandOff(hand_off.memory + 1, hand_off.input_ids))
        if stage == 0 and number == 1:
            two_sends_s = time.perf_counter() - started
    gradients = []
    for number in range(MICRO_BATCHES):
        gradient = torch.full(SHAPE, float(number)) if stage == STAGES - 1 else exchange.receive_gradients()
        gradients.append(float(gradient.mean()))
        if stage > 0:
            inputs[number].memory.grad = gradient + 1
            exchange.send_gradients(inputs[number])
    exchange.finish()
    return {
        "two_sends_s": two_sends_s if stage == 0 else 0.0,
        "activations": [float(each.memory.mean()) for each in inputs],
        "asks_for_gradient": [each.memory.requires_grad for each in inputs],
        "input_ids": [int(each.input_ids.sum()) for each in inputs if each.input_ids is not None],
        "gradients": gradients,
    }


def first(exchange: Exchange, number: int) -> HandOff:
    staggered = exchange.hand_off.input_ids is not None
    return HandOff(torch.full(SHAPE, 10.0 * number), torch.full(SHAPE[:2], number) if staggered else None)


def wrong_shape(exchange: Exchange, stage: int) -> str:
    if stage != 0:
        return ""
    try:
        exchange.send_activations(HandOff(torch.zeros(1, 8, 300), torch.zeros(1, 8, dtype=torch.int64)))
    except TransportError as error:
        return str(error)
    return "accepted"


def lost_peer(exchange: Exchange, stage: int) -> str:
    """The first stage leaves while the second waits for it."""
    if stage == 1:
        exchange.begin([one for step in TrainSchedule(1, STAGES, stage).steps() for one in step])
        try:
            exchange.receive_activations()
        except TransportError as error:
            return str(error)
        return "received"
    if stage == 0:
        assert exchange.activations_out is not None
        exchange.activations_out._outbox._edge.group.abort()
    return ""


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("tests.training.engine.test_exchange:all_cases", STAGES)


@pytest.mark.ranks
@pytest.mark.parametrize("case", ["first", "second", "plain"])
def test_order_and_content_are_kept(ranks: list[dict[str, Any]], case: str) -> None:
    for stage, rank in enumerate(ranks):
        down = [10.0 * number + stage for number in range(MICRO_BATCHES)]
        up = [float(number + STAGES - 1 - stage) for number in range(MICRO_BATCHES)]
        assert rank[case]["activations"] == pytest.approx(down)
        assert rank[case]["gradients"] == pytest.approx(up)
        assert rank[case]["input_ids"] == ([] if case == "plain" else [16 * number for number in range(MICRO_BATCHES)])
        assert rank[case]["asks_for_gradient"] == [stage > 0] * MICRO_BATCHES


@pytest.mark.ranks
def test_a_sender_does_not_wait_for_a_late_peer(ranks: list[dict[str, Any]]) -> None:
    assert all(ranks[0][case]["two_sends_s"] < NAP_S / 2 for case in ("first", "second", "plain"))


@pytest.mark.ranks
def test_a_wrong_shape_is_not_sent(ranks: list[dict[str, Any]]) -> None:
    message = ranks[0]["wrong_shape"]
    assert "activations from stage 0 to stage 1" in message
    assert "[1, 8, 300] float32" in message and "[2, 8, 300] float32" in message
    assert "training.micro_batch_size" in message


@pytest.mark.ranks
def test_a_lost_peer_is_named_with_its_stage(ranks: list[dict[str, Any]]) -> None:
    message = ranks[1]["lost_peer"]
    assert "activations from stage 0 to stage 1" in message
    assert "rank 0" in message and "parallel.timeout_s" in message


def test_the_hand_off_follows_from_the_configuration() -> None:
    assert described(config()) == [(SHAPE, torch.float32), ((2, 8), torch.int64)]
    assert described(config(connection="sequential"), torch.bfloat16) == [(SHAPE, torch.bfloat16)]
    assert described(config(combine_sections=True)) == [((2, *SHAPE), torch.float32), ((2, 8), torch.int64)]


def described(run: RunConfig, dtype: torch.dtype = torch.float32) -> list[tuple[tuple[int, ...], torch.dtype]]:
    hand_off = expected_hand_off(run.model, run.training.micro_batch_size, run.sequence_length, dtype)
    return [(tuple(tensor.shape), tensor.dtype) for tensor in hand_off.to_tuple()]
