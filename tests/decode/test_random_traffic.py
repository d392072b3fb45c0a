"""Requests that come, share beginnings, and are cancelled at random moments get the tokens that they get alone."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from stagdist.decode.operations import operate
from stagdist.decode.request import FinishReason, Request, RequestOutput, SamplingParams, join_outputs
from tests.decode.batches import VARIANTS, arrangement
from tests.decode.decoding import CONTEXT, Case, World, engine_of, prompt, run_cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

COUNT = 24


def traffic(seed: int) -> list[Request]:
    """Requests whose prompts are branches of few texts."""
    draw = random.Random(seed)
    texts = [prompt(CONTEXT, seed=text) for text in range(3)]
    requests = []
    for number in range(COUNT):
        shared = draw.randrange(0, CONTEXT - 4)
        ids = draw.choice(texts)[:shared] + tuple(draw.randrange(36) for _ in range(draw.randrange(1, 4)))
        sampling: dict[str, Any] = {
            "temperature": draw.choice([0.0, 1.0]),
            "seed": number,
            "logprobs": draw.choice([None, 1]),
        }
        scores = draw.choice([None, None, None, 1])
        params = SamplingParams(max_new_tokens=draw.randrange(1, 9), prompt_logprobs=scores, **sampling)
        requests.append(Request(str(number), ids, params))
    return requests


def cases() -> list[Case]:
    """All variants, in three slots."""
    return [arrangement(name, traffic(seed), 3) for seed, name in enumerate(VARIANTS)]


def serve(payload: list[Case]) -> list[dict[str, RequestOutput]]:
    """Called on every rank: outputs of each case by request; outputs on rank 0 decide what happens next."""
    world = World()
    found = []
    for case in payload:
        stage, transport = world.stage(case)
        if transport is not None and transport.rank > 0:
            operate(stage, transport, None)
            continue
        found.append(_serve(engine_of(case, stage, transport), case))
    return found


def _serve(engine: Any, case: Case) -> dict[str, RequestOutput]:
    draw, coming = random.Random(len(case.name)), list(case.requests)
    outputs: dict[str, list[RequestOutput]] = {}

    def act(new: Sequence[RequestOutput]) -> None:
        for output in new:
            outputs.setdefault(output.request_id, []).append(output)
        for _ in range(draw.choice([0, 0, 1, 3])):
            if coming:
                engine.submit(coming.pop(0))
        if draw.random() < 0.15:
            engine.cancel(str(draw.randrange(COUNT)))
        unfinished = any(each[-1].finish_reason is None for each in outputs.values())
        if coming and not unfinished:
            engine.submit(coming.pop(0))
        if not coming:
            engine.close()

    for _ in range(4):
        engine.submit(coming.pop(0))
    engine.run(act)
    assert not coming
    return {name: join_outputs(each) for name, each in outputs.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, RequestOutput]]:
    """Every request of every case in an engine of its own, by variant."""
    result = {}
    for case in cases():
        own = [
            replace(case, requests=[each], options=replace(case.options, num_slots=1, prefix_caching=False))
            for each in case.requests
        ]
        result[case.name] = {ran.completions[0].request_id: ran.completions[0] for ran in run_cases(own)}
    return result


@pytest.mark.parametrize("stages", [1, 2])
def test_traffic_changes_no_token(alone: dict[str, dict[str, RequestOutput]], stages: int) -> None:
    target = "tests.decode.test_random_traffic:serve"
    found = serve(cases()) if stages == 1 else run_ranks(target, stages, cases())[0]
    reused = cancelled = 0
    for case, outputs in zip(cases(), found, strict=True):
        assert outputs.keys() == {each.request_id for each in case.requests}
        for name, done in outputs.items():
            expected, where = alone[case.name][name], f"{case.name}: request {name}"
            reused += done.cached_tokens > 0
            if done.finish_reason is FinishReason.CANCELLED:
                cancelled += 1
                assert done.token_ids == expected.token_ids[: len(done.token_ids)], where
                continue
            assert (done.token_ids, done.finish_reason) == (expected.token_ids, expected.finish_reason), where
            assert (done.prompt_logprobs is None) == (expected.prompt_logprobs is None)
            for one, other in zip(done.prompt_logprobs or (), expected.prompt_logprobs or (), strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-9), where
    assert reused > 20 and cancelled > 5, "the traffic is not what this test is about"
