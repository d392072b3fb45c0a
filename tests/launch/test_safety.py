"""What goes wrong ends in one clear line, a code that is not 0, and nothing half-written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import PRETRAIN, ROOT, _environment, launch, losses, tiny_config, write_config

pytestmark = pytest.mark.ranks


def pretrain_alone(folder: Path, config: dict[str, Any], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python launch/pretrain.py`, a world of one."""
    command = [sys.executable, str(PRETRAIN), "--config", str(write_config(folder, config)), *arguments]
    return subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=120)


def test_a_step_that_is_not_finite_is_skipped_everywhere_and_ends_the_run_unsaved(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(
        corpus,
        "nan",
        optimizer={"learning_rate": 1e30, "max_grad_norm": 0},
        training={"steps": 40, "max_bad_steps": 2},
        checkpoint={"interval_steps": 0},
    )
    run = launch(tmp_path, config)
    assert run.wait() != 0
    assert run.text().count("is skipped on all ranks") == 2, run.text()
    errors = [line for line in run.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "not finite on rank" in errors[0] and "3 steps were" in errors[0]
    assert list((tmp_path / "runs/nan").glob("checkpoints/step_*")) == []


def test_a_full_disk_leaves_the_previous_checkpoint_intact(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, "full")
    assert launch(tmp_path, config, "training.steps=4", "data.num_samples=96").wait() == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "runs/full/checkpoints/step_00000004").iterdir()}
    # A limit on the size of a file fails a write as a full disk does, and needs no mount.
    prefix = ["bash", "-c", 'ulimit -f 30; exec "$@"', "x"]
    limited = launch(tmp_path, config, "training.steps=12", "data.num_samples=96", prefix=prefix)
    assert limited.wait() != 0
    errors = [line for line in limited.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "saving failed on rank" in errors[0] and "previous checkpoint" in errors[0], (
        limited.text()
    )
    assert "Traceback" not in limited.text()
    left = tmp_path / "runs/full/checkpoints"
    assert [path.name for path in left.iterdir()] == ["step_00000004"]
    assert {path.name: path.read_bytes() for path in (left / "step_00000004").iterdir()} == kept

    assert launch(tmp_path, config, "training.steps=12", "data.num_samples=96").wait() == 0
    assert sorted(losses(tmp_path, "full")) == list(range(1, 13))


BAD_INPUT: list[tuple[dict[str, Any], list[str], str]] = [
    ({"data": {"corpora": [{"prefix": "nowhere/corpus"}]}}, [], "nowhere/corpus"),
    ({}, ["--set", "model.vocab_size=200"], "model.vocab_size"),
    ({}, ["--set", "model.hiden_size=64"], "model.hidden_size"),
    ({}, ["--set", "model.num_key_value_heads=3"], "num_key_value_heads"),
    ({}, ["--set", "deepspeed.zero_optimization.stage=2"], "only 1 works"),
    ({}, ["--set", "deepspeed.train_batch_size=2"], "training.global_batch_size"),
    ({}, [], "not a multiple of pipeline 2"),
    ({}, ["--set", "parallel.device=cuda"], "CUDA"),
]


@pytest.mark.parametrize(("changes", "arguments", "complaint"), BAD_INPUT, ids=[entry[2] for entry in BAD_INPUT])
def test_bad_input_gets_one_line_before_any_process_group(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], arguments: list[str], complaint: str
) -> None:
    fits_one_process = [] if "pipeline 2" in complaint else ["--set", "parallel.pipeline_parallel_size=1"]
    done = pretrain_alone(tmp_path, tiny_config(corpus, "bad", **changes), *fits_one_process, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and complaint in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PRETRAIN), "--config", "absent.yaml"], cwd=tmp_path, env=_environment(),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "absent.yaml" in done.stderr


def test_one_process_trains_all_sections_without_a_launcher(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, "alone", training={"steps": 3, "precision": "bf16"})
    done = pretrain_alone(tmp_path, config, "--set", "parallel.pipeline_parallel_size=1")
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path, "alone")) == [1, 2, 3]


def test_the_dry_run_starts_nothing_and_lists_every_obstacle(tmp_path: Path) -> None:
    command = [sys.executable, str(PRETRAIN), "--config", str(ROOT / "configs/quickstart.yaml"), "--dry-run"]
    fits = subprocess.run([*command, "--world-size", "8"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert fits.returncode == 0 and "section" in fits.stdout
    obstacles = ["--set", "model.num_attention_heads=7", "--set", "training.micro_batch_size=5"]
    refused = subprocess.run(
        [*command, "--world-size", "7", *obstacles], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2
    for part in ("num_attention_heads", "micro_batch_size", "world size 7"):
        assert part in refused.stdout, refused.stdout
    assert list(tmp_path.iterdir()) == []
