"""A checkpoint counts if and only if complete.json matches its files."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stagdist.checkpoint.complete import COMPLETE, checkpoint_files, damage, publish, read_complete, write_complete
from stagdist.checkpoint.training.directory import (
    TrainingState,
    candidates,
    checkpoint_name,
    prune,
    read_state,
    staging_folder,
    withdraw,
)
from stagdist.errors import CheckpointError
from stagdist.files import file_record


def make(checkpoints: Path, step: int) -> Path:
    """A finished checkpoint with two files."""
    staged = staging_folder(checkpoints) / checkpoint_name(step)
    (staged / "inner").mkdir(parents=True)
    (staged / "weights.pt").write_bytes(random.Random(step).randbytes(5000))
    (staged / "inner" / "part.pt").write_bytes(b"part")
    TrainingState(step, step * 8, 800, (2, 1, 1)).write(staged)
    write_complete(staged, {name: file_record(staged / name) for name in checkpoint_files(staged)})
    publish(staged, checkpoints / checkpoint_name(step))
    return checkpoints / checkpoint_name(step)


def reason(directory: Path) -> str | None:
    records = read_complete(directory)
    return damage(directory, sorted(records), records)


def test_a_finished_checkpoint_is_whole_and_leaves_no_staging(tmp_path: Path) -> None:
    directory = make(tmp_path, 7)
    assert reason(directory) is None
    assert sorted(read_complete(directory)) == ["inner/part.pt", "state.json", "weights.pt"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]
    assert read_state(directory) == TrainingState(7, 56, 800, (2, 1, 1))


@pytest.mark.parametrize("name", ["weights.pt", "inner/part.pt", "state.json"])
def test_every_kind_of_damage_is_named(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, 1) / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert f"{name} has {len(content) - 1} bytes" in str(reason(tmp_path / checkpoint_name(1)))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{name} has other content" in str(reason(tmp_path / checkpoint_name(1)))
    path.unlink()
    assert reason(tmp_path / checkpoint_name(1)) == f"{name} is missing"


NESTED_30 = json.loads('{"a":' * 30 + "1" + "}" * 30)
NESTED = "[" * 100_000
"""Deeper than a reader can follow."""


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", NESTED, '{"files": {"x": {"size": 1}}}', '{"files": 3}'),
        *(json.dumps({"files": {name: {"size": 1, "sha256": ""}}}) for name in ("../x", "/x", "\0", "\ud800", "a\nb")),
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_marker_is_no_checkpoint(tmp_path: Path, content: str) -> None:
    directory = make(tmp_path, 1)
    (directory / COMPLETE).write_text(content)
    with pytest.raises(CheckpointError, match="complete checkpoint"):
        read_complete(directory)


def test_the_newest_comes_first_and_other_folders_are_not_checkpoints(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 20):
        make(tmp_path, step)
    for other in ("step_x", "step_12", ".saving", "notes"):
        (tmp_path / other).mkdir()
    assert [path.name for path in candidates(tmp_path)] == ["step_100000000", "step_00000020", "step_00000005"]
    assert candidates(tmp_path / "absent") == []


def test_pruning_keeps_the_newest_complete_ones_and_what_is_incomplete(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (tmp_path / checkpoint_name(4) / COMPLETE).unlink()
    newest = tmp_path / checkpoint_name(3)
    prune(tmp_path, 0, newest)
    assert len(candidates(tmp_path)) == 4
    prune(tmp_path, 2, newest)
    assert [path.name for path in candidates(tmp_path)] == ["step_00000004", "step_00000003", "step_00000002"]


def test_pruning_never_takes_what_was_just_saved_for_one_that_claims_a_later_step(tmp_path: Path) -> None:
    for step in (30, 40, 35):
        make(tmp_path, step)
    prune(tmp_path, 1, tmp_path / checkpoint_name(35))
    assert [path.name for path in candidates(tmp_path)] == ["step_00000040", "step_00000035"]


def test_a_damaged_checkpoint_loses_its_marker_and_is_not_counted(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    withdraw(tmp_path / checkpoint_name(20))
    with pytest.raises(CheckpointError, match="complete checkpoint"):
        read_complete(tmp_path / checkpoint_name(20))
    prune(tmp_path, 2, tmp_path / checkpoint_name(30))
    assert (tmp_path / checkpoint_name(10) / COMPLETE).is_file()


def test_publishing_replaces_an_incomplete_namesake(tmp_path: Path) -> None:
    (make(tmp_path, 3) / COMPLETE).unlink()
    assert reason(make(tmp_path, 3)) is None


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    """A run would continue from it forever: its own later checkpoints have earlier names."""
    renamed = make(tmp_path, 7).rename(tmp_path / checkpoint_name(20))
    with pytest.raises(CheckpointError, match="step_00000020 is of step 7; rename it to step_00000007"):
        read_state(renamed)
    assert read_state(renamed.rename(tmp_path / checkpoint_name(7))).step == 7
    assert read_state((tmp_path / checkpoint_name(7)).rename(tmp_path / "kept")).step == 7


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    directory = make(tmp_path, 1)
    for content in (json.dumps({"step": 1}), "[]", NESTED):
        (directory / "state.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
            read_state(directory)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokenizer": 5}, "tokenizer is 5; a string is needed"),
        ({"tokenizer": None}, "tokenizer is None; a string is needed"),
        ({"data_identity": ["x"]}, r"data_identity is \['x'\]; a string is needed"),
        ({"step": "1"}, "its counts are"),
        ({"bad_steps": True}, "its counts are"),
        ({"grid": 5}, "cannot be read"),
        ({"grid": [1, 10**9, 1]}, "three sizes of 1 to 1048576 ranks"),
        ({"text_tokens": [2]}, r"text_tokens is \[2\]; config and generation are needed"),
        ({"text_tokens": {"config": {}, "generation": 3}}, "text_tokens.generation is 3; an object is needed"),
        (
            {"text_tokens": {"config": {"hidden_size": 3}, "generation": {}}},
            "config has hidden_size",
        ),
        (
            {"text_tokens": {"config": {"eos_token_id": "x"}, "generation": {}}},
            "config: eos_token_id is 'x'",
        ),
        ({"text_tokens": {"config": {}, "generation": NESTED_30}}, "generation is nested more than 20 levels deep"),
        ({"text_tokens": list(range(9000))}, r"text_tokens is \[0, 1, 2, 3, 4, 5, \.\.\.\]; config and"),
        ({"format_version": 3}, "format_version is 3; this release reads 2"),
        ({"loss_scaler": {"cur_scale": "x"}}, "numbers by name are needed"),
        ({"generators": [5]}, "generators must hold states in base64"),
        ({"optimizer_steps": -1}, "its counts are"),
        ({"format_version": "x"}, "format_version is 'x'"),
    ],
    ids=str,
)
def test_a_state_with_something_of_a_wrong_kind_is_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    directory = make(tmp_path, 1)
    path = directory / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=rf"state\.json:? .*{complaint}") as caught:
        read_state(directory)
    assert "\n" not in str(caught.value)
