"""`config.json` and the record of what was written must agree."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.errors import CheckpointError
from tests.checkpoint.published.directories import FILE, LLAMA, write

SCALED = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "change", "complaint"),
    [
        ({}, {"rms_norm_eps": 0.5}, r"says rms_norm_eps 0\.5, the weights were written for 1e-05"),
        ({}, {"rope_scaling": SCALED}, "read differently"),
        (LLAMA, {"rope_parameters": SCALED}, r"rope_scaling\.rope_type 'llama3', the weights were written for None"),
        (
            {},
            {"torch_dtype": "bfloat16"},
            "config.json says bfloat16; set dtype or torch_dtype there to float32",
        ),
    ],
)
def test_a_changed_configuration_is_noticed_without_a_sum_being_made(
    tmp_path: Path, keys: dict[str, Any], change: dict[str, Any], complaint: str
) -> None:
    write(tmp_path / "model", keys)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=complaint):
        ModelReader(tmp_path / "model")


def test_another_type_than_was_written_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    tensors = load_file(tmp_path / "model" / FILE)
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "model" / FILE)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": "float16"}))
    with pytest.raises(CheckpointError, match=r"are torch\.float16, torch\.float32 was written"):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([], "does not hold a JSON object"),
        ({"sha256": [1]}, "sha256 must have the checksum of every tensor"),
        ({"sha256": {}}, "sha256 must have the checksum of every tensor"),
        ({"sha256": {"embedding.weight": 1}}, "sha256 must have the checksum of every tensor"),
        ({"sha256": {"embedding.weight": "1"}, "config": [1]}, "config must have keys"),
        ({"sha256": {"embedding.weight": "1"}, "dtype": ["x"]}, "says dtype"),
        ({"sha256": {"embedding.weight": "1"}}, "has no checksum of the tensor sections"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, record: Any, complaint: str) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / "checksums.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"checksums\.json .*{complaint}"):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize("drop", ["dtype", "config"])
def test_a_record_from_before_a_key_was_kept_is_read(tmp_path: Path, drop: str) -> None:
    write(tmp_path / "model", {})
    path = tmp_path / "model" / "checksums.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != drop}))
    ModelReader(tmp_path / "model")


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|does not hold a JSON object)"):
        ModelReader(tmp_path / "model")
