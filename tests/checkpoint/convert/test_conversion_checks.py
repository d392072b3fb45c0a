"""Conversions check the records of a source, read every byte of it once, and report exactly what was proved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stagdist.checkpoint.complete import RunningHashes, read_complete, write_complete
from stagdist.checkpoint.convert.find import find
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.convert.model_conversions import export, merge
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.verify import verify
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.config.loading import dump_config
from stagdist.errors import CheckpointError
from tests.checkpoint.synthetic import complete, model_directory, run_config, training_checkpoint

OPTIONS = ConversionOptions()
PART = "part_00000.safetensors"


# --- what is complete ----------------------------------------------------------------------------------------------


def drop_all(folder: Path) -> None:
    """No record is left."""
    (folder / "complete.json").write_text('{"files": {}}')


def drop_one(folder: Path) -> None:
    """The record of a file is gone."""
    records = read_complete(folder)
    del records[PART]
    write_complete(folder, records)


@pytest.mark.parametrize("tamper", [drop_all, drop_one])
def test_records_must_cover_every_file(tmp_path: Path, tamper: Callable[[Path], None]) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    tamper(folder)
    with pytest.raises(CheckpointError, match=r"complete\.json has no record of "):
        export(folder, tmp_path / "model", OPTIONS)
    assert inspect(folder).problems


def test_a_checkpoint_of_an_earlier_release_is_named(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", {})
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    (folder / "index.json").unlink()
    complete(folder)
    with pytest.raises(CheckpointError, match=r"written by a release that stored DeepSpeed's files; export it"):
        export(tmp_path / "run", tmp_path / "model", OPTIONS)


def test_a_newer_checkpoint_of_a_later_release_is_not_skipped(tmp_path: Path) -> None:
    older = training_checkpoint(tmp_path / "run", {})
    path = shutil.copytree(older, older.with_name("step_00000009")) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    complete(path.parent)
    with pytest.raises(CheckpointError, match="step_00000009/index.json: format_version is 2; this release reads 1"):
        export(tmp_path / "run", tmp_path / "model", OPTIONS)


def test_a_run_means_its_newest_checkpoint_that_is_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    newer = older.with_name("step_00000009")
    shutil.copytree(older, newer)
    assert find(tmp_path / "run").directory == newer
    victim = newer / PART
    victim.write_bytes(victim.read_bytes()[:-1])
    assert find(tmp_path / "run").directory == older
    assert caplog.messages[0].startswith(f"skipping {newer}: {victim.name} has ")
    export(tmp_path / "run", tmp_path / "model", OPTIONS)
    drop_all(older)
    with pytest.raises(CheckpointError, match=rf"{newer.name}.*{victim.name} has"):
        export(tmp_path / "run", tmp_path / "second", OPTIONS)


@pytest.mark.parametrize("verb", ["export", "import", "verify", "inspect"])
def test_a_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """Every byte is hashed once, and no tensor is read before its bytes were."""
    run = training_checkpoint(tmp_path / "run", {}, (2, 2, 1)).parents[1]
    model = model_directory(tmp_path / "model", {})
    hashed: dict[Path, int] = {}
    advance = RunningHashes._advance

    def counted(self: RunningHashes, name: str, stop: int) -> None:
        before = self._positions.get(name, 0)
        advance(self, name, stop)
        path = self._directory / name
        hashed[path] = hashed.get(path, 0) + self._positions.get(name, 0) - before

    monkeypatch.setattr(RunningHashes, "_advance", counted)
    source = find(model if verb == "import" else run).directory
    if verb == "export":
        export(run, tmp_path / "new", OPTIONS)
    elif verb == "import":
        import_model(model, tmp_path / "new", None, OPTIONS)
    elif verb == "verify":
        verify(run, model)
    else:
        inspect(run)
    large = list(source.glob("*.safetensors"))
    assert {path: hashed[path] for path in large} == {path: path.stat().st_size for path in large}


@pytest.mark.parametrize("grid", [[2, 0, 1], [2], [2, 1, "1"], [2, 1, True]])
def test_a_grid_that_is_none_is_named(tmp_path: Path, grid: list[Any]) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (2, 1, 1))
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"grid": grid}))
    complete(folder)
    with pytest.raises(CheckpointError, match=r"state\.json: grid is .* three sizes"):
        export(folder, tmp_path / "model", OPTIONS)
    assert any("state.json: grid is" in problem for problem in inspect(folder).problems)


# --- what is said --------------------------------------------------------------------------------------------------


def test_an_import_is_exact_in_every_precision_of_the_run(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", {}, torch.bfloat16)
    config = tmp_path / "run.yaml"
    for precision in ("fp32", "bf16"):
        config.write_text(dump_config(run_config({}, precision)))
        said = import_model(folder, tmp_path / precision, str(config), OPTIONS).checked
        assert said.endswith("tensors are bit-equal")


def test_values_that_a_precision_cannot_represent_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_checkpoint(tmp_path / "run", {}, precision="bf16")
    value = TrainingReader.value

    def large(self: TrainingReader, *arguments: Any) -> Tensor:
        return value(self, *arguments).mul_(1e7)

    monkeypatch.setattr(TrainingReader, "value", large)
    with pytest.raises(CheckpointError, match=r"has values up to .*, torch\.float16 ends at 6\.55e\+04; choose fp32"):
        export(tmp_path / "run", tmp_path / "model", OPTIONS, precision="fp16")
    assert not (tmp_path / "model").exists()
    export(tmp_path / "run", tmp_path / "model", OPTIONS)


def test_merging_says_what_was_proved_and_wants_one_type_and_tokenizer(tmp_path: Path) -> None:
    one, other = (model_directory(tmp_path / str(seed), {}, seed=seed) for seed in (1, 2))
    said = merge([one, other], tmp_path / "merged", OPTIONS).checked
    assert "are equal to the mean of 2" in said and "bit-equal" not in said
    narrow = model_directory(tmp_path / "narrow", {}, torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"narrow is torch\.bfloat16, .* torch\.float32; merge models of one type"
    ):
        merge([one, narrow], tmp_path / "no", OPTIONS)
    path = other / "tokenizer.json"
    body = json.loads(path.read_text())
    body["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(body))
    (other / "complete.json").unlink()  # the change is intended
    with pytest.raises(CheckpointError, match="has another tokenizer than"):
        merge([one, other], tmp_path / "no", OPTIONS)
    merge([one, other], tmp_path / "named", ConversionOptions(tokenizer="bytes"))


def test_an_export_wants_the_tokenizer_of_the_training(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "0" * 64}))
    complete(folder)
    with pytest.raises(
        CheckpointError, match=r"was trained with another tokenizer than bytes holds now: .*--tokenizer"
    ):
        export(folder, tmp_path / "model", OPTIONS)
    export(folder, tmp_path / "model", ConversionOptions(tokenizer="bytes"))


def test_verify_shows_its_progress(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", {})
    shown: list[str] = []

    def track(items: Any, what: str) -> Any:
        for item in items:
            shown.append(what)
            yield item

    verify(folder, folder, track=track)
    assert len(shown) > 20 and set(shown) == {"computing model"}
