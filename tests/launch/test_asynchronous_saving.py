"""Saves beside the training, by the real command: what happens to one that is cut off or breaks."""

import signal
import time
from pathlib import Path

import pytest

from tests.launch.runs import launch, losses, tiny_config

pytestmark = pytest.mark.ranks

SLOW = """
import os, threading, time
original = os.fsync
def slow(descriptor):
    if threading.current_thread().name == "checkpoint-writer":
        time.sleep(0.7)
        {fault}
    original(descriptor)
os.fsync = slow
"""
"""Planted into every Python process of a run: its disk is slow."""

FAULT = 'if os.environ.get("RANK") == "1" and "step_00000010" in os.readlink(f"/proc/self/fd/{descriptor}"): 1 / 0'


def planted(folder: Path, fault: str = "pass") -> list[str]:
    """Beginning of a command line that makes the disks of its ranks slow."""
    place = folder / f"planted-{time.monotonic_ns()}"
    place.mkdir()
    (place / "sitecustomize.py").write_text(SLOW.replace("{fault}", fault))
    return ["env", f"PYTHONPATH={place}"]


def complete(checkpoints: Path) -> list[str]:
    """Names of the complete checkpoints."""
    return sorted(path.parent.name for path in checkpoints.glob("step_*/complete.json"))


def config(corpus: Path) -> dict:  # type: ignore[type-arg]
    """Saves at steps 5, 10, 15 and 20, which is the last."""
    return tiny_config(corpus, "run", training={"steps": 20}, checkpoint={"interval_steps": 5})


def test_a_rank_killed_while_files_are_written_leaves_the_previous_checkpoint_the_newest(
    corpus: Path, tmp_path: Path
) -> None:
    first = launch(tmp_path, config(corpus), prefix=planted(tmp_path))
    checkpoints = tmp_path / "runs/run/checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / ".saving" / "step_00000010").exists():
        assert first.process.poll() is None and time.monotonic() < deadline, first.text()
        time.sleep(0.01)
    first.wait_for_step(tmp_path / "runs/run/metrics.jsonl", 11)  # training went on beside the write
    ranks = first.ranks()
    ranks[1].send_signal(signal.SIGKILL)
    assert first.wait() != 0
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != "zombie"]
    assert "the save of step 10 waited" in first.text(), first.text()
    assert complete(checkpoints) == ["step_00000005"]

    synchronous = tmp_path / "synchronous"
    synchronous.mkdir()
    second = launch(tmp_path, config(corpus))
    undisturbed = launch(synchronous, config(corpus), "checkpoint.asynchronous=false")
    assert second.wait() == 0, second.text()
    assert "resumed from runs/run/checkpoints/step_00000005" in second.text(), second.text()
    assert sorted(losses(tmp_path, "run")) == list(range(1, 21))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000010", "step_00000015", "step_00000020"]

    assert undisturbed.wait() == 0, undisturbed.text()
    assert "during training" in second.text() and "during training" not in undisturbed.text()
    assert losses(tmp_path, "run") == losses(synchronous, "run")


def test_a_writer_that_breaks_ends_the_run_in_one_line_and_keeps_the_previous(corpus: Path, tmp_path: Path) -> None:
    run = launch(tmp_path, config(corpus), prefix=planted(tmp_path, FAULT))
    assert run.wait() != 0
    errors = [line for line in run.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.text()
    assert errors[0].startswith("error: saving failed on rank 1: the writer of ") and "ZeroDivisionError" in errors[0]
    assert "Traceback" not in run.text(), run.text()
    assert "Traceback" in (tmp_path / "runs/run/logs/rank_00001.log").read_text()
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == ["step_00000005"]
    assert max(losses(tmp_path, "run")) >= 10
