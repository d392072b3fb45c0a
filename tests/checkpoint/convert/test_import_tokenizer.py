"""An imported checkpoint knows the tokenizer of its model, and goes on with no other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagdist.checkpoint.complete import COMPLETE
from stagdist.checkpoint.convert.find import open_training
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.model_conversions import export, merge
from stagdist.checkpoint.convert.staging import ConversionOptions, ConversionResult
from stagdist.checkpoint.convert.verify import verify
from stagdist.config.loading import dump_config
from stagdist.data.tokenizer import train_bpe
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import CheckpointError, ConfigError
from tests.checkpoint.synthetic import model_directory, run_config

Import = Callable[..., ConversionResult]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory with a tokenizer of its own."""
    tokenizer = train_bpe(["to be or not to be " * 20], 270)
    return model_directory(tmp_path / "source", {"vocab_size": 300}, tokenizer=tokenizer)


def bring(source: Path, tokenizer: str | Path | None, given: str | Path | None = None) -> Path:
    """Import for a run whose configuration names a tokenizer; None for no configuration."""
    config: Any = None
    if tokenizer is not None:
        config = source.parent / "run.yaml"
        run = run_config({"vocab_size": 300})
        data = run.data.model_copy(update={"tokenizer": str(tokenizer)})
        config.write_text(dump_config(run.model_copy(update={"data": data})))
    options = ConversionOptions(tokenizer=None if given is None else str(given))
    return import_model(source, source.parent / "run", config if config is None else str(config), options).directory


@pytest.mark.parametrize("named", [False, True], ids=["no configuration", "a configuration that names it"])
def test_the_tokenizer_of_the_directory_is_recorded_and_exported(source: Path, tmp_path: Path, named: bool) -> None:
    reader = open_training(bring(source, source if named else None))
    expected = load_tokenizer(source).fingerprint
    assert reader.state.tokenizer == expected and reader.config.data.tokenizer == str(source)
    export(tmp_path / "run", tmp_path / "again", ConversionOptions())
    assert load_tokenizer(tmp_path / "again").fingerprint == expected


def test_the_tokens_of_the_directory_go_through_a_training_checkpoint(source: Path, tmp_path: Path) -> None:
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4}
    state_tokens(source, tokens, tokens | {"temperature": 0.6})
    bring(source, source)
    again = export(tmp_path / "run", tmp_path / "again", ConversionOptions()).directory
    assert stated_tokens(again) == (tokens, tokens | {"temperature": 0.6})
    # They are those of the tokenizer that is left behind.
    other = export(tmp_path / "run", tmp_path / "other", ConversionOptions(tokenizer="bytes")).directory
    assert stated_tokens(other)[1] == {"eos_token_id": 256, "pad_token_id": 256}
    shutil.rmtree(tmp_path / "run")
    bring(source, None, given="bytes")
    bytes_alone = export(tmp_path / "run", tmp_path / "bytes", ConversionOptions()).directory
    assert stated_tokens(bytes_alone) == stated_tokens(other)


def state_tokens(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> None:
    """Let a model directory say how its texts begin and end."""
    (folder / COMPLETE).unlink()  # the change is intended
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | config))
    (folder / "generation_config.json").write_text(json.dumps(generation))


def stated_tokens(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model directory says about that, in both files."""
    body = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    return {key: value for key, value in body.items() if key.endswith("_token_id")}, generation


def test_a_configuration_with_another_tokenizer_is_refused_with_the_remedy(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.yaml: data\.tokenizer bytes is another tokenizer than that of"
    ) as told:
        bring(source, "bytes")
    assert f"set data.tokenizer to {source} in" in str(told.value) and "--tokenizer bytes if" in str(told.value)
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer cannot be loaded: .*absent does not exist.*; set data\.tok"
    ):
        bring(source, tmp_path / "absent")
    with pytest.raises(
        ConfigError, match=r"another tokenizer than --tokenizer bytes \(.*; set data\.tokenizer to bytes"
    ):
        bring(source, source, given="bytes")
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_that_is_meant_is_recorded_instead(source: Path, tmp_path: Path) -> None:
    reader = open_training(bring(source, "bytes", given="bytes"))
    assert reader.state.tokenizer == load_tokenizer("bytes").fingerprint
    export(tmp_path / "run", tmp_path / "again", ConversionOptions())
    assert load_tokenizer(tmp_path / "again").is_bytes


def test_a_given_tokenizer_is_found_from_any_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokenizer("bytes").save(tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    assert open_training(bring(source, None, given="given")).config.data.tokenizer == str(tmp_path / "given")


def test_a_directory_without_a_tokenizer_records_none(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", COMPLETE):
        (source / name).unlink()
    reader = open_training(bring(source, "bytes"))
    assert reader.state.tokenizer == "" and reader.tokens is None, "ids of a tokenizer that nobody knows"
    assert "text_tokens" not in (reader.directory / "state.json").read_text()


def test_a_tokenizer_of_the_directory_that_cannot_be_read_is_not_passed_over(source: Path) -> None:
    (source / COMPLETE).unlink()  # as in a directory from elsewhere
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer .*tokenizer\.json.*--tokenizer"):
        bring(source, None)


def test_a_run_with_another_tokenizer_cannot_be_exported_as_the_model_it_was(source: Path, tmp_path: Path) -> None:
    (source / COMPLETE).unlink()
    bring(source, None)
    load_tokenizer("bytes").save(source)
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        export(tmp_path / "run", tmp_path / "again", ConversionOptions())
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        verify(tmp_path / "run", source)
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        merge([source, tmp_path / "run"], tmp_path / "again", ConversionOptions())
