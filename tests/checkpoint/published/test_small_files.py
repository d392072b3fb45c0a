"""The small files of a model directory, tokenizer and code: expected where we write them, compared with their sums."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.inspection import as_table, inspect
from stagdist.checkpoint.convert.model_conversions import export, merge, split
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.upcycle import upcycle
from stagdist.checkpoint.convert.verify import verify
from stagdist.checkpoint.published.model_writer import CODE_FILES
from stagdist.errors import CheckpointError
from tests.checkpoint.synthetic import model_directory

OPTIONS = ConversionOptions()
SEQUENTIAL = {"connection": "sequential"}
SHARED = {"share_section_weights": True}
WRITTEN = ["complete.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
           "tokenizer_config.json"]  # fmt: skip
KINDS: list[tuple[dict[str, Any], list[str]]] = [({}, sorted([*WRITTEN, *CODE_FILES])), (SEQUENTIAL, WRITTEN)]


def lowercase(folder: Path) -> None:
    """Another tokenizer that gives as many tokens."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


@pytest.mark.parametrize(("model", "written"), KINDS, ids=["stagformer", "llama"])
def test_every_file_that_is_written_is_expected(tmp_path: Path, model: dict[str, Any], written: list[str]) -> None:
    folder = model_directory(tmp_path / "model", model)
    assert sorted(path.name for path in folder.iterdir()) == written and inspect(folder).problems == []
    for name in set(written) - {"complete.json", "generation_config.json"}:
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


@pytest.mark.parametrize("earlier", [False, True])
def test_a_directory_without_a_record_is_noted(tmp_path: Path, earlier: bool) -> None:
    folder = model_directory(tmp_path / "model", {})
    (folder / "complete.json").unlink()
    if earlier:
        (folder / "checksums.json").write_text("{}")
    report = inspect(folder)
    assert report.problems == [] and report.notes[0].startswith("there is no complete.json: changes after")
    assert ("checksums.json of an earlier release is not read" in report.notes[0]) == earlier
    assert f"note: {report.notes[0]}" in as_table(report)


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
    with pytest.raises(CheckpointError, match=rf"model: {name} (has|is missing).*; get the directory"):
        convert(folder, tmp_path / "result", OPTIONS)
    assert not (tmp_path / "result").exists()


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
    with pytest.raises(CheckpointError, match=r"was trained with another tokenizer than .*; .*--tokenizer$"):
        export(tmp_path / "run", tmp_path / "again", OPTIONS)
    export(tmp_path / "run", tmp_path / "again", ConversionOptions(tokenizer="bytes"))


def test_a_changed_tokenizer_of_a_llama_and_of_a_comparison_is_named(tmp_path: Path) -> None:
    llama = model_directory(tmp_path / "llama", SEQUENTIAL)
    lowercase(llama)
    with pytest.raises(CheckpointError, match=r"llama: tokenizer\.json has "):
        upcycle(llama, tmp_path / "result", [2, 2], OPTIONS, output_scale=0.0)
    with pytest.raises(CheckpointError, match=r"llama: tokenizer\.json has "):
        verify(llama, model_directory(tmp_path / "same", SEQUENTIAL))
