"""`complete.json` of a model directory: what was changed after it was written is refused by name, with the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagdist.checkpoint.complete import RunningHashes, read_complete
from stagdist.checkpoint.published import model_reader
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.model_writer import CODE_FILES
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import model_parameters
from tests.checkpoint.published.directories import FILE, INDEX, LLAMA, change, split, write
from tests.checkpoint.synthetic import model_directory

REMEDY = r"; get the directory from its source again, or remove complete\.json if the change is intended$"
CHANGED = r"has (\d+ bytes, \d+ were written|other content than was written)"
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", *CODE_FILES)


def edit_json(path: Path, **keys: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "edit"),
    [
        ({}, {"rms_norm_eps": 0.5}),
        ({}, {"stagger": 2}),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),  # an added key
        ({}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_a_changed_configuration_is_refused_at_opening(
    tmp_path: Path, keys: dict[str, Any], edit: dict[str, Any]
) -> None:
    write(tmp_path / "model", keys, recorded=True)
    ModelReader(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **edit)
    with pytest.raises(CheckpointError, match=rf"model: config\.json {CHANGED}" + REMEDY):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("removed", [False, True])
def test_a_changed_small_file_is_refused_at_opening(tmp_path: Path, name: str, removed: bool) -> None:
    folder = model_directory(tmp_path / "model", {})
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if not removed:
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = "is missing" if removed else "has other content than was written"
    with pytest.raises(CheckpointError, match=rf"model: {name} {said}" + REMEDY):
        ModelReader(folder)
    (folder / "complete.json").unlink()  # as the message says
    if not removed:
        (folder / name).write_bytes(content)
        ModelReader(folder)


def test_what_users_edit_and_add_is_not_recorded(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", {})
    assert read_complete(folder).keys() == {FILE, *SMALL}
    (folder / "generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.5}')
    (folder / "README.md").write_text("A model.")
    ModelReader(folder).check()


def test_opening_for_decoding_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = write(tmp_path / "model", {}, recorded=True)
    monkeypatch.setattr(RunningHashes, "_advance", lambda *_: pytest.fail("weights were hashed"))
    reader = ModelReader(tmp_path / "model")
    for spec in model_parameters(model):
        reader.weight(spec)


def test_changed_weights_are_refused_when_they_are_checked(tmp_path: Path) -> None:
    write(tmp_path / "model", {}, recorded=True)
    change(tmp_path / "model", lambda tensors: tensors["output_norm.weight"].neg_())
    reader = ModelReader(tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"model: {FILE} has other content than was written" + REMEDY):
        reader.check()


def to_half(folder: Path) -> None:
    """All tensors in fp16, with the configuration that says so."""
    tensors = load_file(folder / FILE)
    save_file({name: value.half() for name, value in tensors.items()}, folder / FILE)


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (to_half, f"{FILE} {CHANGED}"),
        (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1]), f"{FILE} {CHANGED}"),
        (lambda folder: (folder / FILE).unlink(), f"{FILE} is missing"),
        (split, f"{FILE} is missing"),
    ],
    ids=["another type", "cut", "removed", "split"],
)
def test_other_files_of_weights_are_refused_at_opening(
    tmp_path: Path, tamper: Callable[[Path], object], complaint: str
) -> None:
    write(tmp_path / "model", {}, recorded=True)
    tamper(tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"model: {complaint}" + REMEDY):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize("record", [[], {"files": [1]}, {"files": {"config.json": 5}}, {"files": {"config.json": {}}}])
def test_a_damaged_record_is_named(tmp_path: Path, record: Any) -> None:
    write(tmp_path / "model", {}, recorded=True)
    (tmp_path / "model" / "complete.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"model is not a complete checkpoint: complete\.json: "):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_configuration_and_weights_must_be_recorded(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model", {}, recorded=True)
    path = tmp_path / "model" / "complete.json"
    files = json.loads(path.read_text())["files"]
    del files[name]
    path.write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=rf"model: complete\.json has no record of {name}" + REMEDY):
        ModelReader(tmp_path / "model")


def test_a_directory_with_the_record_of_an_earlier_release_loads_as_one_without(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / "checksums.json").write_text('{"sha256": {"embedding.weight": "0"}}')
    ModelReader(tmp_path / "model").check()


@pytest.mark.parametrize("order", ["written", "reversed", "none"])
def test_a_checked_reader_reads_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Whatever was read, and in which order, every file is hashed once from its first to its last byte."""
    monkeypatch.setattr(model_reader, "RunningHashes", Counted)
    model, _ = write(tmp_path / "model", {}, recorded=True)
    split_and_record(tmp_path / "model")
    reader = ModelReader(tmp_path / "model", hashing=True)
    specs = model_parameters(model)
    for spec in {"written": specs, "reversed": specs[::-1], "none": []}[order]:
        reader.weight(spec)
    before = Counted.hashed
    reader.check()
    assert (before > 0) == (order != "none")
    assert Counted.hashed == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))


class Counted(RunningHashes):
    """Counts the bytes that are hashed."""

    hashed = 0

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        type(self).hashed = 0

    def _advance(self, name: str, stop: int) -> None:
        before = self._positions.get(name, 0)
        super()._advance(name, stop)
        type(self).hashed += self._positions.get(name, 0) - before


def split_and_record(folder: Path) -> None:
    """Two files, and a record of them."""
    from tests.checkpoint.synthetic import complete

    split(folder)
    assert (folder / INDEX).is_file()
    complete(folder)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|does not hold a JSON object)"):
        ModelReader(tmp_path / "model")


def test_another_type_than_the_configuration_says_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    edit_json(tmp_path / "model" / "config.json", torch_dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"config\.json says bfloat16; set dtype or torch_dtype there to float32"):
        ModelReader(tmp_path / "model")
    change(tmp_path / "model", lambda tensors: tensors.update({k: v.to(torch.bfloat16) for k, v in tensors.items()}))
    ModelReader(tmp_path / "model")
