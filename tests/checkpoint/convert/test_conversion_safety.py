"""One conversion at a time writes a destination, and an interrupted replacement loses nothing."""

from pathlib import Path

import pytest

from stagdist.checkpoint import complete
from stagdist.checkpoint.convert.find import find
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions, staged_folder
from stagdist.errors import CheckpointError
from tests.checkpoint.synthetic import file_contents, model_directory, training_checkpoint

OPTIONS = ConversionOptions()
OVERWRITE = ConversionOptions(overwrite=True)


# --- one at a time -------------------------------------------------------------------------------------------------


def test_a_second_conversion_to_the_same_place_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    with staged_folder(tmp_path / "model", OPTIONS) as staged:
        (staged / "half").write_text("written")
        with pytest.raises(CheckpointError, match=r"another conversion is writing .*model; wait until it ends"):
            export(tmp_path / "run", tmp_path / "model", OPTIONS)
        assert (staged / "half").read_text() == "written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "the lock must go too"


def test_leftovers_of_a_killed_conversion_go_with_the_next(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    (tmp_path / ".converting-model" / "model").mkdir(parents=True)
    (tmp_path / ".converting-model" / "model" / "half").write_text("written")
    (tmp_path / ".converting-model" / "lock").touch()
    export(tmp_path / "run", tmp_path / "model", OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert not (tmp_path / "model" / "half").exists()


# --- replacing -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process in a test."""


def test_a_kill_while_the_old_one_is_replaced_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1), seed=4)
    final = model_directory(tmp_path / "model", {})
    before, rename = file_contents(final), Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == final and self.parent.name == f".converting-{final.name}":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(complete, "recover", lambda _: None)  # a killed process recovers nothing
        with pytest.raises(Killed):
            export(tmp_path / "run", final, OVERWRITE)
    aside = final.parent / f".replaced-{final.name}"
    assert not final.exists() and file_contents(aside) == before
    with pytest.raises(CheckpointError, match=rf"{final.name} is in {aside.name} because a conversion .* killed"):
        find(final)
    with pytest.raises(CheckpointError, match="exists"):
        export(tmp_path / "run", final, OPTIONS)
    assert file_contents(final) == before and not aside.exists()
    with monkeypatch.context() as patch:
        patch.setattr(complete.shutil, "rmtree", lambda *_, **__: None)  # killed after the renaming
        export(tmp_path / "run", final, OVERWRITE)
    assert file_contents(aside) == before and file_contents(final) != before
    export(tmp_path / "run", final, OVERWRITE)
    assert not list(final.parent.glob(".*"))


def test_a_rename_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1), seed=4)
    final = model_directory(tmp_path / "model", {})
    before, rename = file_contents(final), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.parent.name == f".converting-{final.name}":
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match=r"model could not be written: .*Permission denied"):
        export(tmp_path / "run", final, OVERWRITE)
    assert file_contents(final) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_a_destination_that_cannot_be_made_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for convert in (
        lambda: export(tmp_path / "absent", tmp_path / "file" / "model", OPTIONS),
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
    model_directory(tmp_path / "model", {})
    assert import_model(tmp_path / "model", ".", None, OPTIONS).directory.is_dir()
