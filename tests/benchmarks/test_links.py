"""The benchmark of slow links: its options, stage times, curves and picture, and a run over two processes."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decoding.contestants import DROPPED_STEPS
from benchmarks.decoding.spans import Stretch, counted_steps
from benchmarks.slow_links.link_curves import Curve, crossing, crossings, flat_until
from benchmarks.slow_links.link_picture import draw_links
from benchmarks.slow_links.links import add_arguments, parse_delays, results_beside, run, settings_from
from benchmarks.slow_links.stage_times import median_times, recorded_times
from stagdist.errors import ConfigError
from stagdist.telemetry.spans import Span
from tests.benchmarks.tiny import write_tiny
from tests.ranks import run_ranks

STEPS = DROPPED_STEPS + 8


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    model = "max_position_embeddings: 64\nsection_layers: [2, 2]\n"
    rest = "data: {corpora: [{prefix: unread}]}\ntraining: {steps: 1, global_batch_size: 1, micro_batch_size: 1}\n"
    return str(write_tiny(tmp_path / "tiny.yaml", model=model, rest=rest + "optimizer: {learning_rate: 0.001}\n"))


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


# --- options ----------------------------------------------------------------------------------------------------


def test_latencies_are_rising_numbers_from_zero() -> None:
    assert parse_delays("0,0.5,10") == (0.0, 0.5, 10.0)
    for text in ("0", "1,2", "0,2,1", "0,1,1", "0,few", "", "0,nan", "0,inf"):
        with pytest.raises(ConfigError, match="give rising milliseconds from 0 on"):
            parse_delays(text)


@pytest.mark.parametrize(
    ("given", "processes", "problem"),
    [
        ((), 1, "start at least two"),
        (("--rounds", "0"), 2, "start at 1"),
        (("--steps", "7"), 2, "--steps at 8"),
        (("--png", "curve.svg"), 2, "ends in .png"),
        (("--wire", "no/such/file"), 2, "--wire no/such/file is not a file"),
        (("--separate-memories", "--threads", "2"), 2, "gives each process one core"),
        (("--split", "1+1+2"), 2, "3 sections for 2 processes"),
        (("--set", "model.connection=sequential"), 2, "give a staggered model"),
        (("--context", "60"), 2, "the model knows 64"),
    ],
)
def test_what_cannot_work_is_refused(tiny: str, given: tuple[str, ...], processes: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        settings_from(arguments("--config", tiny, "--context", "24", "--steps", "8", *given), processes)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"benchmark": "decode"}'])
def test_other_files_are_not_drawn_beside(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="does not hold results of this benchmark"):
        results_beside(str(path))


# --- stage times ------------------------------------------------------------------------------------------------


def staggered_spans() -> list[Stretch]:
    """Steps of 10 ms: stage 1 works 8 ms and 0.2 for the host, stage 2 begins for 1, runs for 5 and ends for 3."""
    first, last = [], []
    for step in range(STEPS):
        start = 10.0 * step
        first += [
            span("begin section 1", "compute", step, start, start + 0.5),
            span("run section 1", "compute", step, start + 0.5, start + 7.9),
            span("send hand-off", "send", step, start + 8.0, start + 8.1),
            span("host work", "host work", step, start + 8.1, start + 8.2),
            span("wait for token", "wait for token", step, start + 8.2, start + 10.0),
        ]
        last += [
            span("begin section 2", "compute", step, start, start + 0.9),
            span("wait for memory", "wait for memory", step, start + 1.0, start + 1.1),
            span("run section 2", "compute", step, start + 1.1, start + 6.0),
            span("head", "head", step, start + 6.1, start + 8.0),
            span("sample", "sampling", step, start + 8.0, start + 9.0),
            span("publish token", "send", step, start + 9.6, start + 9.9),
        ]
    return [counted_steps(first), counted_steps(last)]


def span(name: str, category: str, step: int, begin_ms: float, end_ms: float) -> Span:
    return Span(name, category, 0, step, round(begin_ms * 1e6), round(end_ms * 1e6))


def test_stage_times_are_read_from_spans() -> None:
    found = recorded_times(staggered_spans(), 1)
    first, last = found.stages
    assert (first.begin_s, first.rest_s, first.after_s) == pytest.approx((0.0005, 0.0075, 0.0002))
    assert (last.begin_s, last.rest_s, last.after_s) == pytest.approx((0.0011, 0.005, 0.0003))
    assert (found.end_s, found.message_s) == pytest.approx((0.0035, 0.0004))
    assert median_times([found]) == found


def test_a_sequential_stage_begins_when_its_input_is_there() -> None:
    first, last = [], []
    for step in range(STEPS):
        start = 20.0 * step
        first += [
            span("begin section 1", "compute", step, start, start + 1.0),
            span("run section 1", "compute", step, start + 1.0, start + 8.0),
            span("send hand-off", "send", step, start + 8.0, start + 8.1),
            span("wait for token", "wait for token", step, start + 8.1, start + 20.0),
        ]
        last += [
            span("wait for memory", "wait for memory", step, start, start + 8.5),
            span("begin section 2", "compute", step, start + 8.5, start + 10.5),
            span("run section 2", "compute", step, start + 10.5, start + 16.0),
            span("head", "head", step, start + 16.0, start + 18.0),
            span("publish token", "send", step, start + 19.5, start + 19.6),
        ]
    found = recorded_times([counted_steps(first), counted_steps(last)], 0)
    second = found.stages[1]
    assert (second.begin_s, second.rest_s, second.after_s) == pytest.approx((0.002, 0.0055, 0.0001))
    assert (found.end_s, found.message_s) == pytest.approx((0.0035, 0.0005))


# --- curves -----------------------------------------------------------------------------------------------------


def test_a_crossing_lies_between_points_or_nowhere() -> None:
    delays = [0.0, 1.0, 3.0]
    assert crossing(delays, [8.0, 8.0, 8.0], [7.0, 7.0, 9.0]) == 2.0
    assert crossing(delays, [8.0, 8.0, 8.0], [9.0, 9.0, 9.0]) == "from zero"
    assert crossing(delays, [8.0, 8.0, 8.0], [9.0, 9.0, 7.0]) == "never"
    assert crossing(delays, [8.0, 8.0, 8.0], [9.0, 7.0, 9.0]) == 2.0, "for good"


def test_a_curve_is_flat_until_it_leaves_five_percent() -> None:
    assert flat_until([0.0, 2.0, 4.0], [10.0, 10.0, 11.0]) == pytest.approx(3.0)
    assert flat_until([0.0, 2.0], [10.0, 10.2]) is None


def curves() -> list[Curve]:
    ours = Curve("staggered, stagger 1", "2+2", [[8.0, 8.2, 8.1], [9.0, 9.0, 9.5]], [8.0, 9.9])
    return [ours, Curve("tensor parallel", "2 ranks", [[7.0] * 3, [70.0] * 3], [7.0, 70.0])]


def test_curves_report_medians_and_errors() -> None:
    found = curves()[0].described([0.0, 4.0])
    assert found["ms_per_token"] == [8.1, 9.0] and found["spread_ms"][1]["maximum"] == 9.5
    assert found["prediction_error"] == pytest.approx([1 - 8.0 / 8.1, 0.1])
    assert crossings([0.0, 4.0], curves()) == {
        "staggered, stagger 1": {"tensor parallel": pytest.approx(4 * 1.1 / (61.0 + 1.1))}
    }


def test_the_picture_has_both_runs(tmp_path: Path) -> None:
    results = {"delays_ms": [0.0, 4.0], "curves": [curve.described([0.0, 4.0]) for curve in curves()]}
    draw_links(results, tmp_path / "new" / "one.png")
    draw_links(results, tmp_path / "two.png", results)
    one, two = (tmp_path / name for name in ("new/one.png", "two.png"))
    assert one.read_bytes().startswith(b"\x89PNG") and one.read_bytes() != two.read_bytes()


# --- a run ------------------------------------------------------------------------------------------------------


def run_both(payload: dict[str, Any]) -> int:
    """On every rank: the benchmark itself."""
    return run(arguments(*payload["arguments"]))


@pytest.mark.slow  # the tests above check its parts
@pytest.mark.ranks
def test_a_run_over_two_processes_measures_every_way_of_decoding(tiny: str, tmp_path: Path) -> None:
    written, picture = tmp_path / "links.json", tmp_path / "links.png"
    given = ["--config", tiny, "--delays-ms", "0,5", "--rounds", "1", "--steps", "8", "--context", "24"]
    files = ["--json", str(written), "--png", str(picture)]
    run_ranks("tests.benchmarks.test_links:run_both", 2, {"arguments": given + files})
    results = json.loads(written.read_text())
    found = {curve["name"]: curve for curve in results["curves"]}
    assert list(found) == ["staggered, stagger 1", "staggered, stagger 2", "sequential pipeline", "tensor parallel"]
    for name, least_ms in (("staggered, stagger 1", 5.0), ("sequential pipeline", 10.0), ("tensor parallel", 45.0)):
        assert found[name]["ms_per_token"][1] >= 0.8 * least_ms
        assert found[name]["predicted_ms"][1] >= least_ms
    assert found["tensor parallel"]["inputs"]["collectives"] == 9
    assert set(results["crossings_ms"]) == {"staggered, stagger 1", "staggered, stagger 2"}
    assert results["median_prediction_error"] >= 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(results), "a record says nothing about the machine's folders"
