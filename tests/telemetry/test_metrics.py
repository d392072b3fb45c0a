"""Metrics tell one history, in valid JSON, and reach TensorBoard where it is switched on."""

import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from stagdist.config.parts import LoggingConfig
from stagdist.errors import ConfigError
from stagdist.telemetry import metrics
from stagdist.telemetry.metrics import MetricsWriter


def _lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _steps(folder: Path) -> list[int]:
    return [line["step"] for line in _lines(folder)]


def _write(folder: Path, steps: range, resumed_step: int | None) -> None:
    with closing(MetricsWriter(folder, resumed_step=resumed_step)) as writer:
        for step in steps:
            writer.write("train", step, {"loss": float(step)})


def test_a_line_holds_step_time_split_and_plain_values(tmp_path: Path) -> None:
    before = time.time()
    with closing(MetricsWriter(tmp_path / "run")) as writer:
        writer.write("train", 3, {"loss": 2.5, "count": 7, "mfu": None})
    (line,) = _lines(tmp_path / "run")
    assert before - 1e-3 <= line.pop("time") <= time.time() + 1e-3
    assert line == {"step": 3, "split": "train", "loss": 2.5, "count": 7, "mfu": None}


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path)) as writer:
        writer.write("train", 1, {"loss": float("nan"), "grad_norm": float("inf"), "step_s": 1.0})
    (line,) = _lines(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None and line["step_s"] == 1.0


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 9), None)
    _write(tmp_path, range(6, 8), 5)
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_at_the_last_line_keeps_the_file_as_it_is(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4), None)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    _write(tmp_path, range(4, 5), 3)
    assert _steps(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_run_from_the_start_leaves_nothing_of_an_earlier_attempt(tmp_path: Path) -> None:
    _write(tmp_path, range(4), None)
    _write(tmp_path, range(2), None)
    assert _steps(tmp_path) == [0, 1]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 3), None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 2')
    _write(tmp_path, range(3, 5), 2)
    assert _steps(tmp_path) == [1, 2, 3, 4]


def test_a_failure_while_dropping_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, range(1, 9), None)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(ConfigError, match="metrics.jsonl: No space left"):
        MetricsWriter(tmp_path, resumed_step=2)
    assert _steps(tmp_path) == list(range(1, 9))


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from stagdist.telemetry.metrics import MetricsWriter
writer = MetricsWriter(Path({str(tmp_path)!r}))
for step in range(50):
    writer.write("train", step, {{"loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=600).returncode == -9
    assert _steps(tmp_path) == list(range(50))


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(ConfigError, match="runs_directory"):
        MetricsWriter(tmp_path / "run")


def test_tensorboard_shows_one_history_over_a_resume(tmp_path: Path) -> None:
    for steps, resumed_step in ((range(1, 5), None), (range(3, 6), 2)):
        with closing(MetricsWriter(tmp_path, LoggingConfig(tensorboard=True), resumed_step=resumed_step)) as writer:
            for step in steps:
                writer.write("train", step, {"loss": 10.0 * step, "mfu": None})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, 10.0 * step) for step in range(1, 6)
    ]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        MetricsWriter(tmp_path, LoggingConfig(tensorboard=True))
