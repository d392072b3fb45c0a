"""Saves beside the training: what happens to one that is cut off or breaks."""

import random
import signal
from pathlib import Path

import pytest

from tests.launch.faults import slow_disk, slow_disk_that_breaks
from tests.launch.kills import kill_often
from tests.launch.runs import losses, pretrain, tiny_config

pytestmark = pytest.mark.ranks


def complete(checkpoints: Path) -> list[str]:
    """Names of the complete checkpoints."""
    return sorted(path.parent.name for path in checkpoints.glob("step_*/complete.json"))


def config(corpus: Path) -> dict:  # type: ignore[type-arg]
    """Saves at steps 5, 10, 15 and 20, which is the last."""
    return tiny_config(corpus, "run", training={"steps": 20}, checkpoint={"interval_steps": 5})


def test_a_rank_killed_while_files_are_written_leaves_the_previous_checkpoint_the_newest(
    corpus: Path, tmp_path: Path
) -> None:
    first = pretrain(tmp_path, config(corpus), before=slow_disk)
    checkpoints = tmp_path / "runs/run/checkpoints"
    first.wait_until((checkpoints / ".saving" / "step_00000010").exists, "save of step 10")
    first.wait_for_step(tmp_path / "runs/run/metrics.jsonl", 11)  # training went on beside the write
    ranks = first.ranks()
    ranks[1].send_signal(signal.SIGKILL)
    assert first.wait() != 0
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != "zombie"]
    assert "the save of step 10 waited" in first.text(), first.text()
    assert complete(checkpoints) == ["step_00000005"]

    synchronous = tmp_path / "synchronous"
    synchronous.mkdir()
    second = pretrain(tmp_path, config(corpus))
    undisturbed = pretrain(synchronous, config(corpus), "checkpoint.asynchronous=false")
    assert second.wait() == 0, second.text()
    assert "resumed from runs/run/checkpoints/step_00000005" in second.text(), second.text()
    assert sorted(losses(tmp_path, "run")) == list(range(1, 21))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000010", "step_00000015", "step_00000020"]

    assert undisturbed.wait() == 0, undisturbed.text()
    assert "during training" in second.text() and "during training" not in undisturbed.text()
    assert losses(tmp_path, "run") == losses(synchronous, "run")


def test_kills_at_random_moments_lose_no_published_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """`make kill-saves` does it 200 times."""
    report = kill_often(tmp_path, corpus, kills=3, seed=random.SystemRandom().randrange(1000))
    assert report.kills == 3 and report.steps == sorted(report.steps) and report.lost == []


def test_a_writer_that_breaks_ends_the_run_in_one_line_and_keeps_the_previous(corpus: Path, tmp_path: Path) -> None:
    run = pretrain(tmp_path, config(corpus), before=slow_disk_that_breaks)
    assert run.wait() != 0
    errors = run.errors()
    assert len(errors) == 1, run.text()
    assert errors[0].startswith("error: saving failed on rank 1: the writer of ") and "ZeroDivisionError" in errors[0]
    assert "Traceback" not in run.text(), run.text()
    assert "Traceback" in (tmp_path / "runs/run/logs/rank_00001.log").read_text()
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == ["step_00000005"]
    assert max(losses(tmp_path, "run")) == 15  # the next save waits for the writer and reports its failure
