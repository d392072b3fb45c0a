"""Conversions check records, structure, copies and counters of a source, and report exactly what was proved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stagdist.checkpoint.complete import read_complete, write_complete
from stagdist.checkpoint.convert.find import find, open_training
from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.convert.model_conversions import export, merge
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.verify import verify
from stagdist.checkpoint.training import directory as training_directory
from stagdist.checkpoint.training.directory import read_state
from stagdist.checkpoint.training.training_writer import TrainingWriter
from stagdist.config.loading import dump_config
from stagdist.errors import CheckpointError
from stagdist.parallel.grid import Grid
from tests.checkpoint.synthetic import complete, model_directory, run_config, training_checkpoint

OPTIONS = ConversionOptions()
TIED = {"tie_word_embeddings": True, "share_section_weights": True}
OPTIMIZER = "zero_pp_rank_0_mp_rank_01_optim_states.pt"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite one of DeepSpeed's files; `change` does it in place, or returns the new content."""
    content = torch.load(path, weights_only=False)
    changed = change(content)
    torch.save(changed if isinstance(changed, dict | list) else content, path)


def slots(content: Any) -> Any:
    """Adam's state of the first group."""
    return content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


# --- what is complete ----------------------------------------------------------------------------------------------


def drop_all(folder: Path) -> None:
    """No record is left."""
    (folder / "complete.json").write_text('{"files": {}}')


def drop_one(folder: Path) -> None:
    """The record of a file that was changed is gone."""
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    edit(folder / name, lambda content: slots(content)["exp_avg"].fill_(7))
    records = read_complete(folder)
    del records[name]
    write_complete(folder, records)


@pytest.mark.parametrize("tamper", [drop_all, drop_one])
def test_records_must_cover_every_file(tmp_path: Path, tamper: Callable[[Path], None]) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    tamper(folder)
    with pytest.raises(CheckpointError, match=r"complete\.json has no record of "):
        export(folder, tmp_path / "model", OPTIONS)
    with pytest.raises(CheckpointError, match=r"complete\.json has no record of "):
        reshard(tmp_path / "run", tmp_path / "other", Grid(1, 2, 1), OPTIONS)
    assert any("no record of" in problem for problem in inspect(folder).problems)


def test_a_run_means_its_newest_checkpoint_that_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    newer = older.with_name("step_00000009")
    shutil.copytree(older, newer)
    assert find(tmp_path / "run").directory == newer
    victim = newer / "mp_rank_00_model_states.pt"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert find(tmp_path / "run").directory == older
    assert caplog.messages[0].startswith(f"skipping {newer}: {victim.name} has ")
    export(tmp_path / "run", tmp_path / "model", OPTIONS)
    drop_all(older)
    with pytest.raises(CheckpointError, match=rf"{newer.name}.*{victim.name} has"):
        export(tmp_path / "run", tmp_path / "second", OPTIONS)


def test_the_files_of_a_source_are_read_once_to_check_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    hashed: list[str] = []
    measure = training_directory.file_record

    def noted(path: Path, **keys: Any) -> Any:
        hashed.append(path.name)
        return measure(path, **keys)

    monkeypatch.setattr(training_directory, "file_record", noted)
    open_training(tmp_path / "run")
    large = [name for name in hashed if name.endswith(".pt")]
    assert sorted(large) == sorted(path.name for path in folder.glob("*.pt"))


MALFORMED: list[tuple[str, Callable[[Any], Any], str]] = [
    ("mp_rank_00_model_states.pt", lambda _: {}, "lacks two dictionaries of shapes, param_shapes"),
    ("mp_rank_01_model_states.pt", lambda _: [1], "is a list instead of a dictionary"),
    ("layer_01-model_00-model_states.pt", lambda _: [1], "is a list instead of a dictionary"),
    (OPTIMIZER, lambda content: content | {"optimizer_state_dict": {}}, "single_partition_of_fp32_groups"),
    (OPTIMIZER, lambda _: {}, "lacks the dictionary optimizer_state_dict"),
    (OPTIMIZER, lambda content: slots(content).pop("exp_avg"), "lacks the tensor exp_avg of group 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "complaint"), MALFORMED)
def test_files_that_are_built_otherwise_are_named(
    tmp_path: Path, name: str, change: Callable[[Any], Any], complaint: str
) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (2, 1, 1))
    edit(folder / name, change)
    complete(folder)
    for convert in (
        lambda: export(tmp_path / "run", tmp_path / "model", OPTIONS),
        lambda: reshard(tmp_path / "run", tmp_path / "other", Grid(1, 1, 1), OPTIONS),
        lambda: verify(tmp_path / "run", tmp_path / "run"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name} .*{complaint}"):
            convert()
    assert any(name in problem and complaint in problem for problem in inspect(folder).problems)


@pytest.mark.parametrize("grid", [[2, 0, 1], [2], [2, 1, "1"], [2, 1, True]])
def test_a_grid_that_is_none_is_named(tmp_path: Path, grid: list[Any]) -> None:
    folder = training_checkpoint(tmp_path / "run", {}, (2, 1, 1))
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"grid": grid}))
    complete(folder)
    with pytest.raises(CheckpointError, match=r"state\.json: grid is .* three sizes"):
        export(folder, tmp_path / "model", OPTIONS)
    assert any("state.json: grid is" in problem for problem in inspect(folder).problems)


# --- copies and counters -------------------------------------------------------------------------------------------


SOURCE_TAMPERING: list[tuple[str, Callable[[Any], Any], str]] = [
    (OPTIMIZER, lambda content: slots(content)["exp_avg"].__setitem__(slice(0, 9), 7.0),
     r"exp_avg of embedding\.weight on stage 1 is not that of stage 0"),
    (OPTIMIZER, lambda content: slots(content).__setitem__("step", torch.tensor(3.0)), "its step is not that of"),
    (OPTIMIZER, lambda content: content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]
     .__setitem__("lr", 5.0), "its param_groups is not that of rank 0"),
    ("mp_rank_01_model_states.pt", lambda content: content.__setitem__("global_steps", 3), "says global_steps 3, rank"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "complaint"), SOURCE_TAMPERING)
def test_copies_on_later_stages_must_be_those_of_the_first(
    tmp_path: Path, name: str, change: Callable[[Any], Any], complaint: str
) -> None:
    folder = training_checkpoint(tmp_path / "run", TIED, (2, 1, 1))
    edit(folder / name, change)
    complete(folder)
    with pytest.raises(CheckpointError, match=complaint):
        reshard(tmp_path / "run", tmp_path / "other", Grid(1, 1, 1), OPTIONS)


def _everywhere(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        for path in folder.glob("*optim_states.pt"):
            edit(path, change)

    return tamper


def _text(name: str, before: str, after: str) -> Callable[[Path], None]:
    """Change a text file."""

    def tamper(folder: Path) -> None:
        content = (folder / name).read_text()
        assert content.count(before) == 1, content
        (folder / name).write_text(content.replace(before, after))

    return tamper


def _settings(content: Any) -> Any:
    return content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1]


WRITTEN: list[tuple[Callable[[Path], None], str]] = [
    (_everywhere(lambda content: _settings(content).__setitem__("lr", 5.0)), "param_groups was not written"),
    (_everywhere(lambda content: content["optimizer_state_dict"].__setitem__("clip_grad", 5.0)), "clip_grad was not"),
    (lambda folder: edit(folder / "mp_rank_02_model_states.pt", lambda content: content["cpu_random_state"].add_(1)),
     "generators of stage 1, tensor rank 0 were not"),
    (lambda folder: edit(folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt", lambda content: content
     ["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["exp_avg"].__setitem__(slice(0, 3), 7.0)),
     "exp_avg of .* on stage 0, tensor rank 1 was not written"),
    (_text("state.json", '"consumed_samples": 56', '"consumed_samples": 57'), "config.yaml was not written as it was"),
    (_text("config.yaml", "project: stagdist", "project: other"), "config.yaml was not written as it was"),
]  # fmt: skip


@pytest.mark.parametrize(("tamper", "complaint"), WRITTEN)
def test_the_proof_sees_counters_settings_generators_and_every_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Path], None], complaint: str
) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    write = TrainingWriter.write

    def wrong(self: TrainingWriter, *arguments: Any) -> Any:
        records = write(self, *arguments)
        tamper(self._folder)
        return records

    monkeypatch.setattr(TrainingWriter, "write", wrong)
    with pytest.raises(CheckpointError, match=complaint):
        reshard(tmp_path / "run", tmp_path / "other", Grid(2, 1, 2), OPTIONS)


# --- what is said --------------------------------------------------------------------------------------------------


def test_widening_is_exact_and_rounding_is_reported(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", {}, torch.bfloat16)
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(run_config({}, "fp32")))
    wide = import_model(folder, tmp_path / "wide", str(config), OPTIONS).checked
    assert "tensors are bit-equal" in wide and "rounded" not in wide
    config.write_text(dump_config(run_config({}, "bf16")))
    narrow = import_model(
        model_directory(tmp_path / "fp32", {}), tmp_path / "narrow", str(config), OPTIONS
    )
    assert "rounded to bf16" in narrow.checked


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
    sums = json.loads((other / "checksums.json").read_text())
    del sums["files"]["tokenizer.json"]  # the change was meant
    (other / "checksums.json").write_text(json.dumps(sums))
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
    moved = reshard(folder, tmp_path / "moved", Grid(2, 1, 1), OPTIONS).directory
    assert read_state(moved).tokenizer == "0" * 64
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
