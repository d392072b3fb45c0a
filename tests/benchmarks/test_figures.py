"""The arithmetic of the benchmarks."""

import pytest

from benchmarks.common.figures import paired_ratios, pipeline_speedup_bound, spread


def test_equal_stages_are_bound_by_the_start_and_end_of_the_pipeline() -> None:
    assert pipeline_speedup_bound([1.0, 1.0], 8) == pytest.approx(16 / 9)
    assert pipeline_speedup_bound([0.05] * 4, 1000) == pytest.approx(4, rel=0.01)
    assert pipeline_speedup_bound([3.0], 8) == 1


def test_the_slowest_stage_sets_the_pace() -> None:
    assert pipeline_speedup_bound([1.0, 3.0], 8) == pytest.approx(8 * 4 / 25)
    assert pipeline_speedup_bound([1.0, 3.0], 1) == 1, "one micro-batch gains nothing"


def test_cores_that_slow_each_other_down_lower_the_bound() -> None:
    assert pipeline_speedup_bound([1.0, 1.0], 8, [1.25, 1.25]) == pytest.approx(16 / 9 / 1.25)


@pytest.mark.parametrize(("times", "micro_batches"), [([], 8), ([1.0, 0.0], 8), ([1.0], 0)])
def test_times_that_cannot_be_are_refused(times: list[float], micro_batches: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        pipeline_speedup_bound(times, micro_batches)


def test_ratios_are_taken_round_by_round() -> None:
    assert paired_ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError):
        paired_ratios([1.0], [1.0, 2.0])


def test_spread_tells_median_quartiles_and_repeats() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 100.0]) == {
        "median": 3.0,
        "quartile_low": 2.0,
        "quartile_high": 4.0,
        "minimum": 1.0,
        "maximum": 100.0,
        "repeats": 5,
    }
    assert spread([7.0])["quartile_high"] == 7.0
