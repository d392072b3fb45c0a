"""What goes wrong ends in one clear line, a code that is not 0, and nothing half-written."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch.faults import full_disk, one_bit_of_rank_1
from tests.launch.runs import PRETRAIN, ROOT, Forks, losses, pretrain, pretrain_alone, tiny_config

pytestmark = pytest.mark.ranks


def test_a_step_that_is_not_finite_is_skipped_everywhere_and_ends_the_run_unsaved(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(
        corpus,
        "nan",
        optimizer={"learning_rate": 1e30, "max_grad_norm": 0},
        training={"steps": 40, "max_bad_steps": 2},
        checkpoint={"interval_steps": 0},
    )
    run = pretrain(tmp_path, config)
    assert run.wait() != 0
    assert run.text().count("is skipped on all ranks") == 2, run.text()
    errors = run.errors()
    assert len(errors) == 1 and "not finite on rank" in errors[0] and "3 steps were" in errors[0]
    assert list((tmp_path / "runs/nan").glob("checkpoints/step_*")) == []


def test_replicas_that_differ_end_the_run_unsaved(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(
        corpus,
        "bit",
        parallel={"pipeline_parallel_size": 1},
        training={"steps": 12, "audit_steps": 4, "micro_batch_size": 1},
        checkpoint={"interval_steps": 2},
    )
    run = pretrain(tmp_path, config, before=one_bit_of_rank_1)
    assert run.wait() == 1
    (error,) = run.errors()
    assert "step 8: replicas of the model differ: head.weight differs between rank 0 (" in error
    assert "Traceback" not in run.text(), run.text()
    checkpoints = sorted(path.name for path in (tmp_path / "runs/bit/checkpoints").glob("step_*"))
    assert checkpoints[-1] == "step_00000006"
    assert not (tmp_path / "runs/bit/model").exists()


def test_a_full_disk_leaves_the_previous_checkpoint_intact(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, "full", data={"num_samples": 96})
    assert pretrain(tmp_path, config, "training.steps=4").wait() == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "runs/full/checkpoints/step_00000004").iterdir()}
    limited = pretrain(tmp_path, config, "training.steps=12", before=full_disk)
    assert limited.wait() != 0
    errors = limited.errors()
    assert len(errors) == 1 and "saving failed on rank" in errors[0] and "previous checkpoint" in errors[0], (
        limited.text()
    )
    assert "Traceback" not in limited.text()
    left = tmp_path / "runs/full/checkpoints"
    assert [path.name for path in left.iterdir()] == ["step_00000004"]
    assert {path.name: path.read_bytes() for path in (left / "step_00000004").iterdir()} == kept

    assert pretrain(tmp_path, config, "training.steps=12").wait() == 0
    assert sorted(losses(tmp_path, "full")) == list(range(1, 13))


BAD_INPUT: list[tuple[dict[str, Any], list[str], str]] = [
    ({"data": {"corpora": [{"prefix": "nowhere/corpus"}]}}, [], "nowhere/corpus"),
    ({}, ["model.vocab_size=200"], "model.vocab_size"),
    ({}, ["model.hiden_size=64"], "model.hidden_size"),
    ({}, ["model.num_key_value_heads=3"], "num_key_value_heads"),
    ({}, ["deepspeed.zero_optimization.stage=2"], "only 1 works"),
    ({}, ["deepspeed.train_batch_size=2"], "training.global_batch_size"),
    ({}, ["parallel.pipeline_parallel_size=2"], "not a multiple of pipeline 2"),
    ({}, ["parallel.device=cuda"], "CUDA"),
]


@pytest.mark.parametrize(("changes", "overrides", "complaint"), BAD_INPUT, ids=[entry[2] for entry in BAD_INPUT])
def test_bad_input_gets_one_line_before_any_process_group(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], overrides: list[str], complaint: str
) -> None:
    run = pretrain_alone(tmp_path, tiny_config(corpus, "bad", **changes), *overrides)
    errors = run.errors()
    assert run.wait() == 2, run.text()
    assert len(errors) == 1 and complaint in run.text() and "Traceback" not in run.text(), run.text()
    assert not (tmp_path / "runs").exists()


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    run = Forks(tmp_path, PRETRAIN, ["--config", "absent.yaml"], ranks=None)
    assert run.wait() == 2 and run.text().startswith("error: ") and "absent.yaml" in run.text()


def test_one_process_trains_all_sections_without_a_launcher(corpus: Path, tmp_path: Path) -> None:
    run = pretrain_alone(tmp_path, tiny_config(corpus, "alone", training={"steps": 3, "precision": "bf16"}))
    assert run.wait() == 0, run.text()
    assert sorted(losses(tmp_path, "alone")) == [1, 2, 3]


def test_the_dry_run_starts_nothing_and_lists_every_obstacle(tmp_path: Path) -> None:
    words = ["--config", str(ROOT / "configs/quickstart.yaml"), "--dry-run", "--world-size"]
    fits = Forks(tmp_path, PRETRAIN, [*words, "8"], ranks=None)
    assert fits.wait() == 0 and "section" in fits.text()
    obstacles = ["--set", "model.num_attention_heads=7", "--set", "training.micro_batch_size=5"]
    refused = Forks(tmp_path, PRETRAIN, [*words, "7", *obstacles], ranks=None)
    assert refused.wait() == 2
    for part in ("num_attention_heads", "micro_batch_size", "world size 7"):
        assert part in refused.text(), refused.text()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("output-")]
