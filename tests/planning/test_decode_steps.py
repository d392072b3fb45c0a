"""The formula of a step over slow links against stages that are played through, one event after the other."""

import random
from dataclasses import replace
from functools import partial

import pytest

from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.schedule import Instruction, Kind
from stagdist.decode.topology import topology_for
from stagdist.errors import ConfigError
from stagdist.planning.decode_steps import (
    StageWork,
    flat_until_s,
    pipeline_cycles,
    pipeline_step_s,
    section_s,
    tensor_parallel_step_s,
)
from tests.decode.simulation import Pace, program, run

STEPS = 400


def play(stages: list[StageWork], end_s: float, stagger: int, latency_s: float, *, sequential: bool = False) -> float:
    """Mean time of late steps, with every stage's clock moved on as its instructions say."""
    last = len(stages) - 1
    free = [0.0 for _ in stages]  # when a stage can take up its next step
    first_began = token = 0.0
    outputs: list[list[float]] = [[] for _ in stages]
    tokens: list[float] = []
    for step in range(STEPS):
        control = first_began + latency_s if step else 0.0
        for stage, times in enumerate(stages):
            knows = token + (latency_s if stage < last and step else 0.0)
            begin = max(free[stage], knows, control if stage else 0.0)
            if stage == 0:
                first_began = begin
            arrived = 0.0
            if stage and step >= stagger:
                arrived = outputs[stage - 1][step - stagger] + latency_s
            if sequential:
                output = max(begin, arrived) + times.begin_s + times.rest_s
            else:
                output = max(begin + times.begin_s, arrived) + times.rest_s
            outputs[stage].append(output)
            free[stage] = output + times.after_s + (end_s if stage == last else 0.0)
        token = outputs[last][step] + end_s
        tokens.append(token)
    spanned = STEPS // 2
    return (tokens[-1] - tokens[-1 - spanned]) / spanned


def random_stages(count: int, generator: random.Random) -> list[StageWork]:
    return [
        StageWork(generator.uniform(0.0, 2.0), generator.uniform(1.0, 9.0), generator.choice([0.0, 0.5]))
        for _ in range(count)
    ]


@pytest.mark.parametrize("stagger", [0, 1, 2])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_largest_ratio_of_a_cycle_is_the_time_of_a_step(count: int, stagger: int) -> None:
    generator = random.Random(100 * count + stagger)
    for _ in range(15):
        stages, end_s = random_stages(count, generator), generator.uniform(0.0, 3.0)
        cycles = pipeline_cycles(stages, end_s, stagger)
        for latency_s in (0.0, generator.uniform(0.0, 5.0), generator.uniform(5.0, 40.0)):
            found, _ = pipeline_step_s(cycles, latency_s)
            assert found == pytest.approx(play(stages, end_s, stagger, latency_s), rel=0.02)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_sequential_pipeline_adds_up(count: int) -> None:
    generator = random.Random(count)
    stages, end_s = random_stages(count, generator), 1.5
    cycles = pipeline_cycles(stages, end_s, 0, sequential=True)
    for latency_s in (0.0, 3.0, 20.0):
        found, _ = pipeline_step_s(cycles, latency_s)
        work_s = sum(stage.begin_s + stage.rest_s for stage in stages) + end_s
        assert found == pytest.approx(work_s + count * latency_s)
        assert found == pytest.approx(play(stages, end_s, 0, latency_s, sequential=True), rel=0.02)


@pytest.mark.parametrize("stagger", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_without_the_control_message_it_is_the_time_of_the_engines_schedule(count: int, stagger: int) -> None:
    """The instructions of the engine itself, played with the same times; there the publisher waits with all others."""
    generator = random.Random(7 * count + stagger)
    model = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, max_position_embeddings=8,
        section_layers=[1] * count, stagger=stagger,
    )  # fmt: skip
    topology = topology_for(model, count, "last")
    for latency_s in (0.0, 4.0, 11.0, 30.0):
        stages = [StageWork(each.begin_s, each.rest_s) for each in random_stages(count, generator)]
        stages[-1] = replace(stages[-1], after_s=latency_s)
        took = {Kind.BEGIN: [s.begin_s for s in stages], Kind.FINISH: [s.rest_s for s in stages]}
        pace = Pace(partial(_duration, took | {Kind.HEAD: [2.0] * count}), hand_off_s=latency_s, token_s=latency_s)
        played = run(topology, program(topology, "e ~ " + "s " * 150), pace)
        moments = sorted(played.token_s[0].values())
        cycles = [
            cycle for cycle in pipeline_cycles(stages, 2.0, stagger)
            if not any(pair[0] == ("begin", 0) and pair[1][0] == "begin" for pair in _pairs(cycle.events))
        ]  # fmt: skip
        found, _ = pipeline_step_s(cycles, latency_s)
        assert found == pytest.approx((moments[-1] - moments[-61]) / 60, rel=0.02)


def _duration(took: dict[Kind, list[float]], stage: int, instruction: Instruction) -> float:
    return took[instruction.kind][stage] if instruction.kind in took else 0.0


def _pairs(events: tuple[tuple[str, int], ...]) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    return list(zip(events, (*events[1:], events[0]), strict=True))


def test_two_stages_have_the_cycles_of_the_documented_formula() -> None:
    first, second, end_s = StageWork(0.5, 7.5), StageWork(1.0, 5.0), 2.0
    for stagger in (1, 2):
        cycles = pipeline_cycles([first, second], end_s, stagger)
        for latency_s in (0.0, 1.0, 4.0, 9.0):
            expected = max(
                8.0,
                6.0 + end_s,
                (2 * latency_s + 8.0 + 5.0 + end_s) / (stagger + 1),
                (2 * latency_s + 6.0 + end_s) / 2,
            )
            assert pipeline_step_s(cycles, latency_s)[0] == pytest.approx(expected)


def test_steps_are_flat_until_the_slack_is_used_up() -> None:
    stages, end_s = [StageWork(0.5, 7.0), StageWork(1.0, 5.0)], 2.0
    for stagger in (1, 2):
        cycles = pipeline_cycles(stages, end_s, stagger)
        flat_s, flat_for_s = pipeline_step_s(cycles, 0.0)[0], flat_until_s(cycles)
        assert flat_for_s > 0
        assert pipeline_step_s(cycles, flat_for_s)[0] == pytest.approx(flat_s)
        assert pipeline_step_s(cycles, flat_for_s + 0.1)[0] > flat_s
    assert flat_until_s(pipeline_cycles(stages, end_s, 0, sequential=True)) == 0.0


def test_bytes_or_launches_bound_a_section_and_collectives_add_up() -> None:
    assert section_s(80e6, 10e9) == 0.008
    assert section_s(80e6, 10e9, 0.009) == 0.009
    assert tensor_parallel_step_s(0.010, 33, 0.002) == pytest.approx(0.076)


@pytest.mark.parametrize(
    ("stages", "end_s", "stagger", "sequential"),
    [
        ([], 1.0, 1, False),
        ([StageWork(0.0, -1.0)], 1.0, 1, False),
        ([StageWork(0.0, 1.0)], -1.0, 1, False),
        ([StageWork(0.0, 1.0)], 1.0, -1, False),
        ([StageWork(0.0, 1.0)], 1.0, 1, True),
    ],
)
def test_what_is_no_pipeline_is_refused(stages: list[StageWork], end_s: float, stagger: int, sequential: bool) -> None:
    with pytest.raises(ConfigError, match="no steps of"):
        pipeline_cycles(stages, end_s, stagger, sequential=sequential)
