"""A run that is killed, stopped or cut short continues as if nothing had happened."""

import json
import random
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launch.faults import fast_clock
from tests.launch.runs import Run, losses, pretrain, tiny_config

pytestmark = pytest.mark.ranks

STEPS = 40


def long_run(corpus: Path, name: str = "run") -> dict:  # type: ignore[type-arg]
    """A configuration long enough to be interrupted."""
    return tiny_config(
        corpus, name, training={"steps": STEPS}, evaluation={"interval_steps": 10}, checkpoint={"interval_steps": 5}
    )


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = pretrain(folder, long_run(corpus))
    assert run.wait() == 0, run.text()
    return folder


def test_a_run_leaves_everything_the_user_needs(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["bad_steps"] == 0 and summary["tokens_per_s"] > 0
    assert {"validation", "test"} <= summary.keys()
    assert sorted(losses(undisturbed, "run")) == list(range(1, STEPS + 1))
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step_00000030", "step_00000035", "step_00000040"
    ]  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "section_layers" in (run / "config.yaml").read_text()
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["model_type"] == "stagformer" and config["section_layers"] == [1, 1]
    weights = load_file(run / "model" / "model.safetensors")
    assert weights["sections.1.layers.0.cross_attention.k_proj.weight"].shape == (32, 32)
    assert list(losses(undisturbed, "run").values())[-1] < 4.6


def test_a_killed_run_resumes_past_a_truncated_checkpoint_with_the_same_losses(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    step = random.SystemRandom().randint(12, STEPS - 12)
    first = pretrain(tmp_path, long_run(corpus))
    first.wait_for_step(tmp_path / "runs/run/metrics.jsonl", step)
    first.ranks()[random.SystemRandom().randint(0, 1)].send_signal(signal.SIGKILL)
    assert first.wait() != 0
    checkpoints = tmp_path / "runs/run/checkpoints"
    newest = sorted(path for path in checkpoints.glob("step_*") if (path / "complete.json").exists())[-1]
    victim = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with victim.open("r+b") as stream:
        stream.truncate(victim.stat().st_size - 7)

    second = pretrain(tmp_path, long_run(corpus))
    assert second.wait() == 0, second.text()
    assert f"passing over runs/run/checkpoints/{newest.name}: {victim.name} has" in second.text(), second.text()
    assert "Traceback" not in first.text(), first.text()
    assert "resumed from runs/run/checkpoints/step_" in second.text()
    assert losses(tmp_path, "run") == losses(undisturbed, "run"), f"killed after step {step}"
    ours, theirs = (load_file(folder / "runs/run/model/model.safetensors") for folder in (tmp_path, undisturbed))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGTERM), (0, signal.SIGUSR1)])
def test_a_signal_to_any_rank_makes_all_save_and_shut_down_cleanly(
    corpus: Path, undisturbed: Path, tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    config = long_run(corpus) | {"checkpoint": {"interval_steps": 0}}
    first = pretrain(tmp_path, config)
    first.wait_for_step(tmp_path / "runs/run/metrics.jsonl", 6)
    first.ranks()[rank].send_signal(number)
    assert first.wait() == 0, first.text()
    assert f"{number.name} was received" in first.text()
    done = max(losses(tmp_path, "run"))
    assert 6 <= done < STEPS
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == [f"step_{done:08d}"]
    assert not (tmp_path / "runs/run/model").exists()

    if number is signal.SIGTERM:
        second = pretrain(tmp_path, config)
        assert second.wait() == 0, second.text()
        assert losses(tmp_path, "run") == losses(undisturbed, "run")


def test_wall_clock_limits_save_and_stop(corpus: Path, tmp_path: Path) -> None:
    run = pretrain(
        tmp_path,
        long_run(corpus),
        "training.steps=100000",
        "training.max_minutes=0.4",
        "checkpoint.interval_steps=0",
        "checkpoint.interval_minutes=0.02",
        before=fast_clock,
    )
    assert run.wait() == 0, run.text()
    assert "training.max_minutes is reached" in run.text()
    assert run.text().count("saved runs/run/checkpoints") >= 2, run.text()


def test_steps_may_be_raised_also_on_another_grid(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, "run", data={"num_samples": 96}, training={"steps": 8})
    assert pretrain(tmp_path, config).wait() == 0
    before = losses(tmp_path, "run")
    longer = pretrain(tmp_path, config, "training.steps=12", "parallel.pipeline_parallel_size=1")
    assert longer.wait() == 0, longer.text()
    assert "was saved on pipe x data x tensor 2x1x1, this run has pipe 1 x data 2 x tensor 1" in longer.text()
    after = losses(tmp_path, "run")
    assert sorted(after) == list(range(1, 13)) and all(after[step] == loss for step, loss in before.items())

    refused = [
        (pretrain(tmp_path, config, *overrides), complaint)
        for overrides, complaint in (
            (["training.steps=13", "data.num_samples=104"], "data.num_samples"),
            (["checkpoint.resume=never"], "checkpoint.resume is never"),
        )
    ]  # beside each other: they only read
    for run, complaint in refused:
        _refuses(run, complaint)


def _refuses(run: Run, complaint: str) -> None:
    assert run.wait() != 0
    errors = run.errors()
    assert len(errors) == 1 and complaint in errors[0], run.text()
    assert "Traceback" not in run.text()
