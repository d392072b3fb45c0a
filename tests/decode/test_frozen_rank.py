"""A rank that stands still is noticed within the timeout, while others wait for work and while they decode."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from stagdist.config.parts import ModelConfig
from stagdist.decode.operations import operate
from stagdist.decode.request import FinishReason, Request, SamplingParams
from stagdist.decode.runtime import transport as transport_module
from stagdist.decode.runtime.build import EngineOptions, build_stage, plan_decoding
from stagdist.errors import TransportError
from tests.decode.batches import arrangement
from tests.decode.decoding import Outbox, config_of, engine_of, prompt, reader
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

TIMEOUT_S = 2.0
CONTEXT = 4096


def freeze(busy: bool) -> tuple[float, str, str | None]:
    """Called on both ranks: rank 1 is stopped, and rank 0 says when it noticed, what, and how its request ended."""
    dist.init_process_group("gloo")
    pids: list[int | None] = [None, None]
    dist.all_gather_object(pids, os.getpid())
    case = arrangement("plain", [], 1)
    keys = {"max_position_embeddings": CONTEXT}
    options = replace(EngineOptions(), precision="fp32", chunk_size=8, timeout_s=TIMEOUT_S)
    plan = plan_decoding(ModelConfig(**config_of(keys)), options, 2)
    link = transport_module.Transport(plan.grid, "cpu", TIMEOUT_S)
    stage = build_stage(plan, reader(replace(case, keys=keys)), "cpu", link)
    if link.rank:
        try:
            operate(stage, link, None)
        except TransportError:
            return 0.0, "", None
        raise AssertionError("rank 0 went on")
    engine, outbox = engine_of(case, stage, link, heartbeat_s=TIMEOUT_S / 3), Outbox()
    frozen_s: list[float] = []

    def strike() -> None:
        time.sleep(0.3)
        assert pids[1] is not None
        frozen_s.append(time.monotonic())
        os.kill(pids[1], signal.SIGSTOP)

    if busy:
        params = SamplingParams(max_new_tokens=CONTEXT, temperature=0.0)
        engine.submit(Request("long", prompt(9), params))
    threading.Thread(target=strike).start()
    try:
        engine.run(outbox)
    except TransportError as error:
        noticed = time.monotonic() - frozen_s[0]
        done = outbox.completions.get("long")
        return noticed, str(error), None if done is None else done.finish_reason
    finally:
        os.kill(pids[1] or 0, signal.SIGCONT)
    raise AssertionError("the engine ended")


@pytest.mark.parametrize("busy", [False, True])
def test_a_frozen_rank_is_noticed_within_the_timeout(busy: bool) -> None:
    (noticed_s, message, finish), _ = run_ranks("tests.decode.test_frozen_rank:freeze", 2, busy)
    # A heartbeat may be due a third of the timeout later; the rest is for a busy machine.
    assert TIMEOUT_S / 2 < noticed_s < 2.5 * TIMEOUT_S
    assert "stage 0 (rank 0) lost" in message and "--timeout" in message
    assert finish is (FinishReason.ERROR if busy else None)
