"""Fragments of global tensors: any grid reads what any other grid wrote, and only the bytes it needs."""

import json
import random
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stagdist.checkpoint.training.directory import checkpoint_damage
from stagdist.checkpoint.training.index import KINDS, VALUE, Box, box_numel, read_index, rectangles
from stagdist.checkpoint.training.reader import TrainingReader, stored_box
from stagdist.errors import CheckpointError, OtherReleaseError
from stagdist.parallel.layout import model_parameters
from tests.checkpoint.synthetic import complete, optimizer_value, parameters_of, training_checkpoint

EVERYTHING = {"share_section_weights": True, "tie_word_embeddings": True, "combine_sections": True}
GRIDS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 3, 2), (2, 2, 2)]


def plain_read(folder: Path, name: str, kind: str) -> NDArray[np.float32]:
    """A reader of the format written from its description alone, without stagdist, torch or safetensors."""
    entry = json.loads((folder / "index.json").read_text())["tensors"][name]
    out = np.full(entry["shape"], np.nan, dtype=np.float32)
    for fragment in entry["fragments"]:
        content = (folder / fragment["file"]).read_bytes()
        length = int.from_bytes(content[:8], "little")
        begin, end = json.loads(content[8 : 8 + length])[f"{fragment['key']}.{kind}"]["data_offsets"]
        values = np.frombuffer(content[8 + length + begin : 8 + length + end], dtype="<f4")
        box = tuple(slice(*side) for side in fragment["box"])
        part = out[box].flatten()
        part[slice(*fragment["range"])] = values
        out[box] = part.reshape(out[box].shape)
    return out


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
@pytest.mark.parametrize("model", [{}, EVERYTHING, {"connection": "sequential"}], ids=["separate", "all", "sequential"])
def test_global_tensors_are_read_from_every_grid(tmp_path: Path, model: dict[str, Any], sizes: Any) -> None:
    folder = training_checkpoint(tmp_path, model, sizes)
    reader = TrainingReader(folder)
    expected = parameters_of(reader.model)
    for spec, kind in product(model_parameters(reader.model), KINDS):
        value = optimizer_value(expected[spec.name], kind)
        assert torch.equal(reader.value(spec, kind), value), (spec.name, kind)
        assert np.array_equal(plain_read(folder, spec.name, kind), value.numpy()), (spec.name, kind)
    assert checkpoint_damage(folder) is None


@pytest.mark.parametrize("written", GRIDS, ids=str)
def test_a_rank_of_any_grid_reads_its_share_and_no_byte_more(tmp_path: Path, written: Any) -> None:
    folder = training_checkpoint(tmp_path, {}, written)
    expected = parameters_of(TrainingReader(folder).model)
    for tensor_size in (1, 2, 4):
        for rank in range(tensor_size):
            reader, share = TrainingReader(folder), 0
            for spec in model_parameters(reader.model):
                box = stored_box(spec, rank, tensor_size)
                start = random.Random(spec.name).randrange(box_numel(box))
                out = torch.empty(box_numel(box) - start)
                reader.fill(out, spec.name, VALUE, box, start)
                part = expected[spec.name][tuple(slice(*side) for side in box)]
                assert torch.equal(out, part.flatten()[start:]), spec.name
                share += out.nbytes
            assert reader.bytes_read == share


def test_rectangles_cover_a_range_of_a_box_once() -> None:
    generator = random.Random(5)
    for _ in range(300):
        box: Box = tuple(
            (start, start + generator.randint(1, 6)) for start in (generator.randint(0, 4), generator.randint(0, 4))
        )
        start = generator.randrange(box_numel(box))
        stop = generator.randint(start + 1, box_numel(box))
        places = torch.full((12, 12), -1)
        for rows, columns, offset in rectangles(box, start, stop):
            part = places[slice(*rows), slice(*columns)]
            assert bool((part == -1).all())
            part.copy_(torch.arange(offset, offset + part.numel()).view_as(part))
        inside = places[slice(*box[0]), slice(*box[1])].flatten()
        assert inside[start:stop].tolist() == list(range(stop - start))
        assert bool((inside[:start] == -1).all()) and bool((inside[stop:] == -1).all())


def test_weights_of_a_lower_precision_are_the_rounded_values(tmp_path: Path) -> None:
    reader = TrainingReader(training_checkpoint(tmp_path, {}, (2, 2, 1), "bf16"))
    for spec in model_parameters(reader.model):
        assert torch.equal(reader.weight(spec), reader.value(spec).bfloat16())


def edited(folder: Path, change: Any) -> str:
    """What is reported of a checkpoint whose index was changed by hand, records included."""
    path = folder / "index.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    complete(folder)
    with suppress(OtherReleaseError):
        if reason := checkpoint_damage(folder):
            return reason
    with pytest.raises(CheckpointError) as refused:
        reader = TrainingReader(folder)
        for spec in model_parameters(reader.model):
            reader.value(spec)
    assert "\n" not in str(refused.value)
    return str(refused.value)


NORM = "output_norm.weight"
MATRIX = "sections.0.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda b: b["tensors"].pop(NORM), f"{NORM} is missing"),
        (lambda b: b["tensors"].update(x=b["tensors"][NORM]), "x is no tensor of the model"),
        (lambda b: b["tensors"][NORM].update(shape=[17]), r"is [17], the model needs [16]"),
        (lambda b: b["tensors"][NORM]["fragments"][0].update(range=[0, 15]), "do not hold every value once"),
        (lambda b: b["tensors"][NORM]["fragments"][0].update(box=[[0, 99]]), "outside the tensor"),
        (lambda b: b["tensors"][NORM]["fragments"].clear(), "0 of 16 values are stored"),
        (lambda b: b["tensors"][NORM]["fragments"].append(b["tensors"][NORM]["fragments"][0]), "every value once"),
        (lambda b: b["tensors"][MATRIX]["fragments"][0].update(box=[[1, 13], [0, 16]]), "two fragments overlap"),
        (lambda b: b["tensors"][NORM]["fragments"][0].update(key="y"), "y.value cannot be read"),
        (lambda b: b["tensors"][NORM]["fragments"][0].update(key=MATRIX), "the index says torch.float32"),
        (lambda b: b["tensors"][NORM]["fragments"][0].update(file="../x"), "is damaged: tensors"),
        (lambda b: b["tensors"][NORM]["fragments"][0].update(key="x\ny"), "is damaged: tensors"),
        (lambda b: b.update(format_version=9), "format_version is 9; this release reads 1"),
        (lambda b: b.update(kinds=["exp_avg"]), "kinds are ['exp_avg']"),
        (lambda b: b.update(more=1), "is damaged: more"),
        (lambda b: b["tensors"][NORM]["fragments"][0].update(range=[-1, 3]), "is damaged: tensors"),
    ],
)
def test_an_index_that_does_not_describe_the_model_is_refused(tmp_path: Path, change: Any, complaint: str) -> None:
    assert complaint in edited(training_checkpoint(tmp_path, {}, (1, 1, 2)), change)


@pytest.mark.parametrize("file", ["index.json", "state.json", "config.yaml", "part_00001.safetensors"])
@pytest.mark.parametrize("fault", ["cut", "one bit", "removed", "of another checkpoint", "swapped"])
def test_every_fault_of_a_file_is_named(tmp_path: Path, file: str, fault: str) -> None:
    folder = training_checkpoint(tmp_path / "a", {}, (2, 1, 1))
    other = training_checkpoint(tmp_path / "b", {"rope_theta": 77.0}, (2, 2, 1), seed=4)
    path = folder / file
    content = bytearray(path.read_bytes())
    if fault == "cut":
        path.write_bytes(content[:-1])
    elif fault == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "removed":
        path.unlink()
    else:
        source = other / file if fault == "of another checkpoint" else folder / "part_00000.safetensors"
        path.write_bytes(source.read_bytes())
    assert file in str(checkpoint_damage(folder))


@pytest.mark.parametrize("change", [{"optimizer_steps": 0}, {"generators": [{"cpu": "?"}]}, {"generators": [{}]}])
def test_a_state_that_contradicts_the_tensors_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = training_checkpoint(tmp_path, {}) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="moments are stored from the first step on|must hold states in base64"):
        TrainingReader(path.parent)


@pytest.mark.parametrize("record", [{"size": 1.5, "sha256": ""}, {"size": 1, "sha256": 2}])
def test_a_record_of_another_kind_or_place_is_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    path = training_checkpoint(tmp_path, {}) / "complete.json"
    for name in ("state.json", "../x", "/etc/passwd"):
        path.write_text(json.dumps({"files": {name: record if name == "state.json" else {"size": 1, "sha256": ""}}}))
        assert "is not a complete checkpoint" in str(checkpoint_damage(path.parent)), name


def test_the_index_of_an_older_release_is_named(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path, {})
    (folder / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        read_index(folder)
    state = json.loads((folder / "state.json").read_text()) | {"format_version": 1}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="stored DeepSpeed's files; export it with that release"):
        TrainingReader(folder)
