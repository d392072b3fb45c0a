"""Where the time of a step goes: categories, phases and slacks from spans."""

import pytest

from benchmarks.decoding.contestants import DROPPED_STEPS
from benchmarks.decoding.spans import (
    MEASURES,
    PhaseClock,
    counted_steps,
    milliseconds_per_step,
)
from stagdist.decode.runtime.executor import CATEGORIES
from stagdist.telemetry.clocks import HostClock
from stagdist.telemetry.spans import Span

MS = 1_000_000


def of_step(name: str, category: str, step: int, begin: float, end: float) -> Span:
    return Span(name, category, 0, step, int(begin * MS), int(end * MS))


def test_a_step_is_split_into_categories_and_what_lies_between_them() -> None:
    spans = []
    for step in range(DROPPED_STEPS + 3):
        start = 10.0 * step
        spans.append(of_step("run section", "compute", step, start, start + 6))
        spans.append(of_step("head", "head", step, start + 6, start + 8))
        spans.append(of_step("publish token", "send", step, start + 8, start + 9))
    spans.append(of_step("run section", "compute", 0, -500, -1))  # the prefill carries the number of the first step
    found = milliseconds_per_step(counted_steps(spans))
    assert found["step"] == pytest.approx(10) and found["compute"] == pytest.approx(6)
    assert found["head"] == pytest.approx(2) and found["communication_calls"] == pytest.approx(1)
    assert found["between_instructions"] == pytest.approx(1)
    with pytest.raises(ValueError, match="2 steps were recorded, 6 are needed"):
        counted_steps(spans[:6])


def test_a_host_that_is_ahead_of_its_gpu_neither_begins_nor_lengthens_a_step() -> None:
    spans = []
    for step in range(DROPPED_STEPS + 3):
        start = 10.0 * step
        spans.append(of_step("host work", "host work", step, start - 4, start - 2))
        spans.append(of_step("run section", "compute", step, start, start + 9))
    found = milliseconds_per_step(counted_steps(spans))
    assert found["step"] == pytest.approx(10) and found["host_work"] == pytest.approx(2)
    assert found["between_instructions"] == pytest.approx(1)


def test_every_category_of_a_stage_has_a_measure() -> None:
    assert set(CATEGORIES.values()) == set(MEASURES)


def test_phases_are_timed_from_the_beginning_of_their_span() -> None:
    clock = PhaseClock(HostClock())
    begin = clock.mark()
    clock.lap("self_attention")
    clock.lap("mlp")
    clock.lap("self_attention")
    end = clock.mark()
    found = clock.seconds(begin, end)
    assert 0 < sum(found.values()) <= (end - begin) / 1e9 and found["cross_attention"] == 0
    assert clock.seconds(end, end + 1) == dict.fromkeys(found, 0.0)
