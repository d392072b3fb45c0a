"""A git-lfs pointer, a web page or an empty file in place of the real one is named at every door, with the remedy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stagdist.checkpoint.convert.find import open_model, open_training
from stagdist.config.loading import load_config
from stagdist.data.prepare.formats import open_input
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.decode.frontend.prompts import check_prompts_file
from stagdist.errors import StagdistError
from stagdist.evaluation.bits_per_byte import read_text
from tests.checkpoint.published.directories import split
from tests.checkpoint.synthetic import model_directory, training_checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 135\n"
PAGE = "\n<!doctype HTML>\n<html><body>Sign in</body></html>"
MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json", "complete.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model") / "model", {})


def message(action: Callable[[], object]) -> str:
    with pytest.raises(StagdistError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_file_of_a_model_directory(tmp_path: Path, model: Path, name: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    for content, problem in ((POINTER, "is a git-lfs pointer, not the file: run git lfs pull"), (PAGE, "is a web page"),
                             ("", "is empty (0 bytes)")):  # fmt: skip
        (folder / name).write_text(content)
        found = message(lambda: open_model(folder))
        assert f"{folder / name}" in found and problem in found


def test_a_shard_and_the_index(tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    split(folder)
    (folder / "complete.json").unlink()
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text(POINTER)
        assert f"{name} is a git-lfs pointer" in message(lambda: open_model(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_file_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    byte_tokenizer().save(tmp_path)
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_text(POINTER)
    assert f"{tmp_path / name} is a git-lfs pointer" in message(lambda: load_tokenizer(tmp_path))


def test_a_tokenizer_needs_no_file_that_is_not_read(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer.model").write_text(POINTER)
    assert load_tokenizer(tmp_path).is_bytes


def test_a_file_of_a_training_checkpoint(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", {})
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 5
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_text(POINTER)
        assert f"{folder / name} is a git-lfs pointer" in message(lambda: open_training(folder)), name
        (folder / name).write_bytes(content)
    open_training(folder)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.jsonl.gz", "a.arrow", "a.json"])
def test_a_file_of_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    problem = f"{tmp_path / name} is a git-lfs pointer, not the file: run git lfs pull in its directory"
    assert message(lambda: prepare([str(tmp_path / name)], str(tmp_path / "o"), byte_tokenizer())) == problem
    assert not list(tmp_path.glob("o*"))


def test_other_files_that_a_user_names(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(POINTER)
    for action in (lambda: read_text(path), lambda: check_prompts_file(path), lambda: load_config(path)):
        assert "is a git-lfs pointer" in message(action)
    for content in (PAGE, ""):  # legitimate text
        path.write_text(content)
        assert read_text(path) == content
        check_prompts_file(path)
        open_input(str(path)).close()
