"""One conversion at a time writes a destination, and an interrupted replacement loses nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stagdist.checkpoint.convert import staging
from stagdist.checkpoint.convert.find import find
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions, exclusive, put_back, staged_folder
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.training.directory import withdraw
from stagdist.checkpoint.training.training_writer import TrainingWriter
from stagdist.errors import CheckpointError
from stagdist.parallel.grid import Grid
from tests.checkpoint.synthetic import file_contents, model_directory, training_checkpoint

OPTIONS = ConversionOptions()
OVERWRITE = ConversionOptions(overwrite=True)


# --- one at a time -------------------------------------------------------------------------------------------------


def test_a_second_conversion_to_the_same_place_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    with staged_folder(tmp_path / "model", "model", OPTIONS) as staged:
        (staged / "half").write_text("written")
        with pytest.raises(CheckpointError, match=r"another conversion is writing .*model; wait until it ends"):
            export(tmp_path / "run", tmp_path / "model", OPTIONS)
        assert (staged / "half").read_text() == "written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "the lock must go too"


def test_leftovers_of_a_killed_conversion_go_with_the_next(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    (tmp_path / ".converting-model" / "model").mkdir(parents=True)
    (tmp_path / ".converting-model" / "model" / "half").write_text("written")
    (tmp_path / ".converting-model.lock").touch()
    export(tmp_path / "run", tmp_path / "model", OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert not (tmp_path / "model" / "half").exists()


def test_a_file_that_another_program_put_there_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    write = TrainingWriter.write

    def disturbed(self: TrainingWriter, *arguments: Any) -> Any:
        records = write(self, *arguments)
        (self._folder / "stray.pt").write_text("odd")
        return records

    monkeypatch.setattr(TrainingWriter, "write", disturbed)
    with pytest.raises(CheckpointError, match=r"stray\.pt should not have been written"):
        reshard(tmp_path / "run", tmp_path / "moved", Grid(2, 1, 1), OPTIONS)
    assert not (tmp_path / "moved").exists()


# --- replacing -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process in a test."""


@pytest.mark.parametrize("kind", ["model", "training"])
def test_a_kill_while_the_old_one_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1), seed=4)
    final = tmp_path / "model" if kind == "model" else tmp_path / "other" / "checkpoints" / "step_00000007"
    made = model_directory(final, {}) if kind == "model" else training_checkpoint(tmp_path / "other", {}, seed=5)
    before = file_contents(made)

    def convert(options: ConversionOptions) -> object:
        if kind == "model":
            return export(tmp_path / "run", final, options)
        return reshard(tmp_path / "run", tmp_path / "other", Grid(2, 1, 1), options)

    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == final and self.parent.name == f".converting-{final.name}":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            convert(OVERWRITE)
    aside = final.parent / f".replaced-{final.name}"
    assert not final.exists() and file_contents(aside) == before
    with pytest.raises(CheckpointError, match=rf"{final.name} is in {aside.name} because a conversion .* killed"):
        find(final if kind == "model" else tmp_path / "other")
    with pytest.raises(CheckpointError, match="exists"):
        convert(OPTIONS)
    assert file_contents(final) == before and not aside.exists()
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", lambda *_, **__: None)
        convert(OVERWRITE)
    assert file_contents(aside) == before and file_contents(final) != before
    convert(OVERWRITE)
    assert not list(final.parent.glob(".*"))


def test_only_a_newer_checkpoint_that_lost_its_name_stops_a_reader(tmp_path: Path) -> None:
    newer = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    for step, stops in ((3, False), (9, True), (100_000_000, True)):
        left = newer.with_name(f".replaced-step_{step:08d}")
        shutil.copytree(newer, left)
        if stops:
            with pytest.raises(CheckpointError, match=rf"step_{step:08d} is in {left.name}.*; start that conversion"):
                find(tmp_path / "run")
        else:
            assert find(tmp_path / "run").directory == newer
        shutil.rmtree(left)


def test_a_damaged_checkpoint_does_not_hide_one_that_lost_its_name(tmp_path: Path) -> None:
    old = training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    shutil.copytree(old, old.with_name(".replaced-step_00000008"))
    damaged = shutil.copytree(old, old.with_name("step_00000009"))
    withdraw(damaged)
    with pytest.raises(CheckpointError, match=r"step_00000008 is in \.replaced-step_00000008"):
        find(tmp_path / "run")


def test_what_a_running_conversion_replaces_is_not_put_back(tmp_path: Path) -> None:
    (tmp_path / ".replaced-a").mkdir()
    (tmp_path / ".replaced-b").mkdir()
    (tmp_path / "b").mkdir()
    with (
        exclusive(tmp_path / ".converting-a.lock", "busy"),
        pytest.raises(CheckpointError, match=r"another conversion is writing .*a; wait until it ends"),
    ):
        put_back(tmp_path)
    assert put_back(tmp_path) == [tmp_path / "a"] and put_back(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "what was left of an old b goes"
    assert put_back(tmp_path / "absent") == []


def test_a_destination_that_cannot_be_made_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for convert in (
        lambda: export(tmp_path / "absent", tmp_path / "file" / "model", OPTIONS),
        lambda: reshard(tmp_path / "absent", tmp_path / "file" / "run", Grid(1, 1, 1), OPTIONS),
        lambda: import_model(tmp_path / "absent", tmp_path / "file" / "run", None, OPTIONS),
    ):
        with pytest.raises(
            CheckpointError, match=r"cannot be made: .*file is no folder that can be written to; choose"
        ):
            convert()


def test_the_folder_one_stands_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for destination in (".", "..", tmp_path / "here"):
        with pytest.raises(CheckpointError, match=r"here.* holds the current folder; choose another destination"):
            export(tmp_path / "absent", destination, OPTIONS)
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    assert reshard(tmp_path / "run", ".", Grid(1, 1, 1), OPTIONS).directory.is_dir()
