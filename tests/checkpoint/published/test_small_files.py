"""The small files of a model directory, tokenizer and code: expected where we write them, compared with their sums."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.convert.model_conversions import export, merge, split
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.upcycle import upcycle
from stagdist.checkpoint.convert.verify import verify
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.model_writer import CODE_FILES
from stagdist.errors import CheckpointError
from stagdist.parallel.grid import Grid
from tests.checkpoint.synthetic import model_directory

OPTIONS = ConversionOptions()
SEQUENTIAL = {"connection": "sequential"}
SHARED = {"share_section_weights": True}
WRITTEN = ["checksums.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
           "tokenizer_config.json"]  # fmt: skip
KINDS: list[tuple[dict[str, Any], list[str]]] = [({}, sorted([*WRITTEN, *CODE_FILES])), (SEQUENTIAL, WRITTEN)]


def record(folder: Path) -> dict[str, Any]:
    """The content of `checksums.json`."""
    body: dict[str, Any] = json.loads((folder / "checksums.json").read_text())
    return body


def lowercase(folder: Path) -> None:
    """Another tokenizer that gives as many tokens."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


@pytest.mark.parametrize(("model", "written"), KINDS, ids=["stagformer", "llama"])
def test_every_file_that_is_written_is_expected(tmp_path: Path, model: dict[str, Any], written: list[str]) -> None:
    folder = model_directory(tmp_path / "model", model)
    assert sorted(path.name for path in folder.iterdir()) == written and inspect(folder).problems == []
    for name in set(written) - {"config.json", "model.safetensors"}:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert inspect(folder).problems == [f"{name} is missing"]
        (folder / name).write_bytes(content)
    assert inspect(folder).problems == []


def test_a_llama_of_others_needs_only_its_configuration_and_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").unlink()
    assert inspect(tmp_path / "llama").problems == []


@pytest.mark.parametrize("keep", ["checksums.json", "keys", "model_type"])
def test_a_directory_is_known_as_ours_by_any_trace(tmp_path: Path, keep: str) -> None:
    folder = model_directory(tmp_path / "model", {} if keep == "model_type" else SEQUENTIAL | {"section_layers": [2]})
    (folder / "tokenizer.json").unlink()
    if keep != "checksums.json":
        (folder / "checksums.json").unlink()
    if keep == "checksums.json":
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in body.items() if k != "connection"}))
    assert "tokenizer.json is missing" in inspect(folder).problems


def test_tokenizer_and_code_are_recorded_and_what_people_edit_is_not(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", {})
    assert sorted(record(folder)["files"]) == sorted([*CODE_FILES, "tokenizer.json", "tokenizer_config.json"])
    (folder / "generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.5}')
    assert inspect(folder).problems == []
    split(model_directory(tmp_path / "shared", SHARED), tmp_path / "separate", OPTIONS)
    assert record(tmp_path / "separate")["files"] == record(folder)["files"]


@pytest.mark.parametrize("name", [*CODE_FILES, "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_file_is_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    folder = model_directory(tmp_path / "model", {})
    (folder / name).write_text((folder / name).read_text() + "\n")
    problems = inspect(folder).problems
    assert len(problems) == 1 and problems[0].startswith(f"{name} has other content than was written (checksums.json)")
    body = record(folder)
    del body["files"][name]  # as the message says
    (folder / "checksums.json").write_text(json.dumps(body))
    assert inspect(folder).problems == []


CONVERSIONS: list[tuple[str, Callable[[Path, Path, ConversionOptions], object]]] = [
    ("split", split),
    ("merge", lambda source, target, options: merge([source.with_name("other"), source], target, options)),
    ("import", lambda source, target, options: import_model(source, target, None, options)),
]  # fmt: skip


@pytest.mark.parametrize("change", ["swapped", "other end", "end unsaid"])
@pytest.mark.parametrize(("verb", "convert"), CONVERSIONS)
def test_conversions_do_not_pass_on_a_tokenizer_that_was_changed(
    tmp_path: Path, verb: str, convert: Callable[[Path, Path, ConversionOptions], object], change: str
) -> None:
    folder = model_directory(tmp_path / "model", SHARED)
    model_directory(tmp_path / "other", SHARED)
    if change == "swapped":
        lowercase(folder)
    elif change == "other end":
        (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    else:
        (folder / "tokenizer_config.json").unlink()
    name = "tokenizer.json" if change == "swapped" else "tokenizer_config.json"
    with pytest.raises(CheckpointError, match=rf"model: {name} (has other|is missing).*; --tokenizer names another$"):
        convert(folder, tmp_path / "result", OPTIONS)
    assert not (tmp_path / "result").exists()
    convert(folder, tmp_path / "result", ConversionOptions(tokenizer="bytes"))


def test_what_hubs_and_version_controls_leave_is_not_odd(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", SHARED)
    (folder / ".cache" / "hub").mkdir(parents=True)
    for name in (".gitattributes", ".cache/hub/model.metadata", "LICENSE", "README.md"):
        (folder / name).write_text("text")
    assert inspect(folder).problems == []
    (folder / "model.bin").write_text("text")
    assert inspect(folder).problems == ["model.bin does not belong here"]


def test_an_imported_run_does_not_export_a_tokenizer_that_was_changed_since(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", {})
    import_model(folder, tmp_path / "run", None, OPTIONS)
    lowercase(folder)
    with pytest.raises(CheckpointError, match=r"model: tokenizer\.json has other .*; --tokenizer names another$"):
        export(tmp_path / "run", tmp_path / "again", OPTIONS)
    export(tmp_path / "run", tmp_path / "again", ConversionOptions(tokenizer="bytes"))


def test_a_changed_tokenizer_of_a_llama_and_of_a_comparison_is_named(tmp_path: Path) -> None:
    llama = model_directory(tmp_path / "llama", SEQUENTIAL)
    lowercase(llama)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has other content"):
        upcycle(llama, tmp_path / "result", [2, 2], OPTIONS, output_scale=0.0)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has other content"):
        verify(llama, model_directory(tmp_path / "same", SEQUENTIAL))
    assert verify(llama, tmp_path / "same", tokenizer="bytes").largest_difference == 0


def test_a_directory_from_before_small_files_were_recorded_is_whole(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", SHARED, torch.bfloat16)
    body = record(folder)
    del body["files"]
    (folder / "checksums.json").write_text(json.dumps(body))
    lowercase(folder)
    assert inspect(folder).problems == []
    split(folder, tmp_path / "separate", OPTIONS)


@pytest.mark.parametrize("files", [[], {"tokenizer.json": 5}, {"../tokenizer.json": "0"}, {"": "0"}], ids=str)
def test_a_record_of_small_files_that_is_none_is_damaged(tmp_path: Path, files: Any) -> None:
    folder = model_directory(tmp_path / "model", {})
    (folder / "checksums.json").write_text(json.dumps(record(folder) | {"files": files}))
    with pytest.raises(CheckpointError, match=r"checksums\.json is damaged: files must have checksums"):
        ModelReader(folder)
