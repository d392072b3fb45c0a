"""The picture of decoding: it is drawn from spans alone, and shows typical steps."""

from pathlib import Path

import pytest

from benchmarks.decoding.timeline import COLORS, Panel, draw_timeline, typical_start
from stagdist.decode.runtime.executor import CATEGORIES
from stagdist.telemetry.spans import Span

MS = 1_000_000


def spans(stage: int, step_ms: float, steps: int, *, begin: float, length: float) -> list[Span]:
    """One computing span per step, and a wait for the rest of it."""
    found = []
    for step in range(steps):
        start = (step * step_ms + begin) * MS
        middle = start + length * MS
        found.append(Span("run section", "compute", stage, step, int(start), int(middle)))
        found.append(Span("wait for token", "wait for token", stage, step, int(middle), int((step + 1) * step_ms * MS)))
    return found


def test_every_category_of_a_stage_has_a_colour() -> None:
    assert set(CATEGORIES.values()) == set(COLORS)


def test_the_picture_is_written_whole_with_both_panels(tmp_path: Path) -> None:
    from matplotlib.image import imread

    side_by_side = Panel(
        "staggered", [spans(0, 10, 12, begin=0, length=9), spans(1, 10, 12, begin=1, length=8)], (5, 3), 1
    )
    in_turns = Panel("sequential", [spans(0, 20, 8, begin=0, length=9), spans(1, 20, 8, begin=10, length=9)], (4, 4), 0)
    path = tmp_path / "new" / "timeline.png"
    draw_timeline([side_by_side, in_turns], path, steps=3)
    pixels = imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 800
    blue = (abs(pixels[..., 0] - 0x3B / 255) < 0.02) & (abs(pixels[..., 2] - 0xB6 / 255) < 0.02)
    upper, lower = blue[: len(blue) // 2], blue[len(blue) // 2 :]
    assert upper.sum() > 1.5 * lower.sum() > 0, "staggered sections compute nearly all the time, the others half of it"
    assert list(path.parent.iterdir()) == [path], "nothing is left lying about"


def test_a_typical_stretch_is_shown_and_not_the_disturbed_one() -> None:
    lengths = [10, 10, 50, 10, 10, 10, 10, 10]
    begins = [sum(lengths[:step]) for step in range(len(lengths) + 1)]
    start = typical_start(begins, 3)
    assert begins[start + 3] - begins[start] == 30
    assert begins[-1] - begins[typical_start(begins, 1, 100 / 1e6)] >= 100, "the axis is filled where it can be"
    with pytest.raises(ValueError, match="3 steps cannot show 3; record at least 5"):
        typical_start(begins[:3], 3)
