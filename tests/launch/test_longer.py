"""A finished run is trained for longer: with its optimizer, in an order of samples that is fixed beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stagdist.checkpoint.training.directory import read_state
from stagdist.checkpoint.training.index import KINDS
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.parallel.layout import model_parameters
from tests.launch.runs import Run, losses, pretrain, tiny_config

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A blend of two small corpora: 4 steps of 8 samples read more than an epoch of the first."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, documents in (("a", 20), ("b", 60)):
        texts = (f"{name}: document {number} holds {number * number} and its number" for number in range(documents))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([str(folder / f"{name}.jsonl")], str(folder / name), byte_tokenizer())
    return [{"prefix": str(folder / "a"), "weight": 2}, {"prefix": str(folder / "b")}]


def config(corpora: list[dict[str, Any]], **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of 4 steps whose learning rate does not depend on the number of steps."""
    data = {"corpora": corpora, "split": [80, 10, 10], **sections.pop("data", {})}
    fixed: dict[str, Any] = {
        "training": {"steps": 4},
        "scheduler": {"kind": "constant"},
        "checkpoint": {"keep_last": 0},
    }
    return tiny_config(Path("unused"), "run", data=data, **{**fixed, **sections})


def files(folder: Path) -> dict[Path, bytes]:
    """Content of all files of the run, without its logs."""
    paths = (path for path in (folder / "runs").rglob("*") if path.is_file() and "logs" not in path.parts)
    return {path: path.read_bytes() for path in paths}


def finished(run: Run, step: int) -> str:
    assert run.wait() == 0, run.text()
    assert f"runs/run: finished at step {step} of {step}" in run.text() and "Traceback" not in run.text()
    return run.text()


@pytest.fixture(scope="module")
def straight(corpora: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained 16 steps without a stop on the samples of 4."""
    folder = tmp_path_factory.mktemp("straight")
    finished(pretrain(folder, config(corpora, data={"num_samples": 32}), "training.steps=16"), 16)
    return folder


def assert_same_run(folder: Path, other: Path, step: int) -> None:
    """Losses, the state of the optimizer and the published model are equal bit by bit."""
    assert losses(folder, "run") == losses(other, "run")
    ours, theirs = (TrainingReader(one / f"runs/run/checkpoints/step_{step:08d}") for one in (folder, other))
    for spec in model_parameters(theirs.model):
        assert all(ours.value(spec, kind).equal(theirs.value(spec, kind)) for kind in KINDS)
    assert ours.state.optimizer_steps == theirs.state.optimizer_steps == step
    assert read_state(ours.directory) == read_state(theirs.directory)
    models = [load_file(one / "runs/run/model/model.safetensors") for one in (folder, other)]
    assert all(models[0][name].equal(value) for name, value in models[1].items())


def test_runs_that_are_extended_twice_equal_one_without_a_stop(
    corpora: list[dict[str, Any]], straight: Path, tmp_path: Path
) -> None:
    """4 steps, 9 and 16."""
    finished(pretrain(tmp_path, config(corpora)), 4)
    first = (tmp_path / "runs/run/model/model.safetensors").read_bytes()
    text = finished(pretrain(tmp_path, config(corpora), "training.steps=9"), 9)
    assert "resumed from runs/run/checkpoints/step_00000004" in text and "training.steps was" not in text
    assert (tmp_path / "runs/run/model/model.safetensors").read_bytes() != first, "the model is published again"
    finished(pretrain(tmp_path, config(corpora, data={"num_samples": 32}), "training.steps=16"), 16)
    names = sorted(path.name for path in (tmp_path / "runs/run/checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in (4, 8, 9, 12, 16)]
    assert_same_run(tmp_path, straight, 16)
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["steps"] == 16
    assert summary["test"] == json.loads((straight / "runs/run/summary.json").read_text())["test"]
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "test"] == [4, 9, 16], "evaluated at each end"


def test_a_run_is_extended_on_more_replicas_with_the_same_samples(
    corpora: list[dict[str, Any]], straight: Path, tmp_path: Path
) -> None:
    finished(pretrain(tmp_path, config(corpora), "parallel.pipeline_parallel_size=1", ranks=None), 4)
    finished(pretrain(tmp_path, config(corpora), "training.steps=16", "parallel.pipeline_parallel_size=1"), 16)
    assert losses(tmp_path, "run") == pytest.approx(losses(straight, "run"), abs=1e-5)


def test_the_log_reports_the_moved_schedule_and_a_lower_number_of_steps_is_refused(
    corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    cosine = config(corpora, scheduler={"kind": "cosine"})
    alone = ["parallel.pipeline_parallel_size=1"]
    finished(pretrain(tmp_path, cosine, *alone, ranks=None), 4)
    text = finished(pretrain(tmp_path, cosine, *alone, "training.steps=6", "scheduler.decay_steps=4", ranks=None), 6)
    assert "learning rate of step" not in text, "it stays at the minimum"
    text = finished(pretrain(tmp_path, cosine, *alone, "training.steps=8", ranks=None), 8)
    report = [line for line in text.splitlines() if "learning rate of step" in line]
    assert len(report) == 1
    assert "training.steps was 6, is 8" in report[0] and "step 7 is 0.0002318 instead of 0.0001" in report[0]

    before = files(tmp_path)
    refused = pretrain(tmp_path, cosine, *alone, "training.steps=7", ranks=None)
    assert refused.wait() == 2
    assert len(refused.errors()) == 1 and "training.steps is 7; set it to 8 or more" in refused.errors()[0]
    assert files(tmp_path) == before
