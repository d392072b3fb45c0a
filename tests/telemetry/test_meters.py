"""Speeds follow from step numbers and an injected clock alone."""

import pytest

from stagdist.telemetry.meters import ThroughputMeter


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _meter(clock: Clock, **changes: object) -> ThroughputMeter:
    settings: dict = {
        "flops_per_token": 6e9,
        "tokens_per_step": 1000,
        "num_devices": 4,
        "peak_flops": 1e13,
        "total_steps": 10,
        "window_steps": 2,
    }
    return ThroughputMeter(**(settings | changes), clock=clock)


def _run(meter: ThroughputMeter, clock: Clock, durations: list[float], first_step: int = 0) -> None:
    meter.start(first_step)
    for step, seconds in enumerate(durations, start=first_step + 1):
        clock.now += seconds
        meter.record(step)


def test_speeds_of_even_steps() -> None:
    clock = Clock()
    meter = _meter(clock)
    _run(meter, clock, [0.5, 0.5])
    reading = meter.reading()
    assert reading["tokens_per_s"] == pytest.approx(2000)
    assert reading["step_s"] == pytest.approx(0.5)
    assert reading["model_tflops_per_s"] == pytest.approx(12.0)
    assert reading["model_tflops_per_s_per_device"] == pytest.approx(3.0)
    assert reading["mfu"] == pytest.approx(0.3)
    assert reading["time_left_s"] == pytest.approx(8 * 0.5)


def test_only_the_window_counts_but_the_average_sees_all() -> None:
    clock = Clock()
    meter = _meter(clock)
    _run(meter, clock, [10.0, 0.5, 0.25])
    assert meter.reading()["step_s"] == pytest.approx(0.375)
    assert meter.average_tokens_per_s() == pytest.approx(3000 / 10.75)


def test_pauses_do_not_slow_the_steps_but_lengthen_the_time_left() -> None:
    clock = Clock()
    meter = _meter(clock)
    meter.start(0)
    clock.now += 1.0
    meter.record(1)
    with meter.paused():
        clock.now += 2.0
    clock.now += 1.0
    meter.record(2)
    reading = meter.reading()
    assert reading["step_s"] == pytest.approx(1.0)
    assert meter.average_tokens_per_s() == pytest.approx(1000.0)
    assert reading["time_left_s"] == pytest.approx(8 * 1.0 * (1 + 2.0 / 2.0))


def test_a_resumed_run_counts_only_its_own_steps() -> None:
    clock = Clock()
    meter = _meter(clock)
    _run(meter, clock, [2.0], first_step=7)
    assert meter.reading()["tokens_per_s"] == pytest.approx(500)
    assert meter.reading()["time_left_s"] == pytest.approx(2 * 2.0)


def test_steps_may_be_recorded_at_intervals() -> None:
    clock = Clock()
    meter = _meter(clock)
    meter.start(0)
    clock.now += 4.0
    meter.record(4)
    assert meter.reading()["step_s"] == pytest.approx(1.0)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    clock = Clock()
    meter = _meter(clock, peak_flops=None)
    _run(meter, clock, [1.0])
    assert "mfu" not in meter.reading()
    assert meter.reading()["tokens_per_s"] == pytest.approx(1000)


def test_the_time_left_ends_at_zero() -> None:
    clock = Clock()
    meter = _meter(clock, total_steps=2)
    _run(meter, clock, [1.0, 1.0, 1.0])
    assert meter.reading()["time_left_s"] == 0


def test_a_clock_too_coarse_does_not_divide_by_zero() -> None:
    clock = Clock()
    meter = _meter(clock)
    _run(meter, clock, [0.0])
    assert meter.reading()["tokens_per_s"] > 0
