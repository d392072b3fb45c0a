"""Chunks taper where a prompt is alone; beside steps their size follows what operations took."""

from collections.abc import Callable

import pytest

from stagdist.decode import chunk_sizer
from stagdist.decode.chunk_sizer import ChunkSizer, tapering_chunk
from stagdist.decode.runtime.build import EngineOptions
from stagdist.decode.topology import Limits
from stagdist.errors import ConfigError

STEP_S = 0.008


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in one place."""
    now = [100.0]
    monkeypatch.setattr(chunk_sizer.time, "perf_counter", lambda: now[0])
    return now


def run(sizer: ChunkSizer, clock: list[float], cost: Callable[[int], float], count: int) -> list[int]:
    """Steps with chunks; the sizes chosen."""
    sizes = []
    for _ in range(count):
        sizes.append(sizer.chunk)
        clock[0] += STEP_S + cost(sizer.chunk)
        sizer.took(steps=True, chunk=sizer.chunk)
    return sizes


def warmed(clock: list[float], target_s: float | None, most: int = 256) -> ChunkSizer:
    """After plain steps."""
    sizer = ChunkSizer(Limits(1, 4096, most, inter_token_target_s=target_s))
    for _ in range(20):
        clock[0] += STEP_S
        sizer.took(steps=True, chunk=0)
    assert sizer.step_s == pytest.approx(STEP_S)
    return sizer


@pytest.mark.parametrize("fixed_s", [0.0, 0.005])
@pytest.mark.parametrize("target_s", [0.03, 0.06, 0.1])
def test_steps_with_chunks_come_close_to_the_target_from_below(
    clock: list[float], target_s: float, fixed_s: float
) -> None:
    def cost(rows: int) -> float:
        return fixed_s + 0.0009 * rows

    sizes = run(warmed(clock, target_s), clock, cost, 40)
    assert sizes[0] == 16 and all(size % 16 == 0 for size in sizes)
    assert all(STEP_S + cost(size) <= target_s for size in sizes), "never above it, at the beginning neither"
    assert STEP_S + cost(sizes[-1] + 32) > 0.9 * target_s


def test_sizes_are_learned_without_a_step_that_has_no_chunk(clock: list[float]) -> None:
    sizer = ChunkSizer(Limits(1, 4096, 256, inter_token_target_s=0.06))
    sizes = run(sizer, clock, lambda rows: 0.0005 * rows, 40)
    assert sizer.step_s == 0 and sizes[0] == 16
    assert all(STEP_S + 0.0005 * size <= 0.06 for size in sizes) and STEP_S + 0.0005 * (sizes[-1] + 32) > 0.9 * 0.06


def test_a_slower_machine_gets_smaller_chunks_and_the_smallest_is_16(clock: list[float]) -> None:
    sizer = warmed(clock, 0.06)
    fast = run(sizer, clock, lambda rows: 0.0005 * rows, 30)[-1]
    slow = run(sizer, clock, lambda rows: 0.001 * rows, 30)[-1]
    assert slow < 0.7 * fast
    assert run(sizer, clock, lambda rows: 0.1 * rows, 30)[-1] == 16


def test_without_a_target_or_with_a_large_one_chunks_are_as_large_as_they_may_be(clock: list[float]) -> None:
    assert run(warmed(clock, None), clock, lambda rows: 0.1 * rows, 3) == [256] * 3
    assert run(warmed(clock, 10.0), clock, lambda rows: 0.001 * rows, 30)[-1] == 256
    assert warmed(clock, 0.001, most=5).chunk == 5


def test_pauses_are_no_steps(clock: list[float]) -> None:
    sizer = warmed(clock, 0.06)
    sizer.pause()
    clock[0] += 100
    sizer.took(steps=True, chunk=0)
    assert sizer.step_s == pytest.approx(STEP_S)
    clock[0] += 100  # the process stood still
    sizer.took(steps=True, chunk=0)
    assert sizer.step_s < 1.3 * STEP_S


@pytest.mark.parametrize("target_ms", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_that_makes_no_sense_is_refused(target_ms: float) -> None:
    with pytest.raises(ConfigError, match="--inter-token-target-ms"):
        EngineOptions(inter_token_target_ms=target_ms)


def cut(length: int, most: int) -> list[int]:
    """Sizes of the chunks of a prompt that has the stages to itself."""
    sizes: list[int] = []
    while remaining := length - sum(sizes):
        sizes.append(tapering_chunk(remaining, most))
    return sizes


@pytest.mark.parametrize("most", [5, 48, 128, 256, 512])
@pytest.mark.parametrize("length", [1, 5, 47, 64, 100, 257, 1024, 1500])
def test_chunks_of_a_prompt_alone_become_smaller_and_none_is_tiny(length: int, most: int) -> None:
    sizes = cut(length, most)
    assert sum(sizes) == length and max(sizes) <= most
    assert all(size == most or size % 16 == 0 for size in sizes[:-1])
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert min(sizes[:-1], default=most) >= min(most, 96)
    assert sizes[-1] >= 16 or most < 128 or length < 16


def test_the_last_stage_has_little_to_do_after_the_first_one_and_is_never_behind() -> None:
    """Stages of the time `24 + positions`, the second one a little faster."""

    def time_of(sizes: list[int]) -> float:
        first = second = 0.0
        for size in sizes:
            first += 24 + size
            second = max(first, second) + 0.88 * (24 + size)
        return second

    assert time_of(cut(1024, 256)) < 0.98 * min(time_of([size] * (1024 // size)) for size in (64, 128, 256, 512))
