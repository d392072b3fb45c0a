"""What a run refuses to resume from, what it removes, and what it verifies at its end: the same on all ranks."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from stagdist.checkpoint.complete import read_complete, write_complete
from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.published import model_writer as model_directory
from stagdist.checkpoint.published.model_writer import CODE_FILES
from stagdist.checkpoint.training.directory import TrainingState, checkpoint_name
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import CheckpointError, StagdistError, TransportError
from stagdist.parallel.groups import Groups
from stagdist.parallel.layout import ParameterSpec, model_parameters
from stagdist.telemetry.pulse import Phase, Pulse
from stagdist.training import publish
from stagdist.training.engine.agreement import while_others_wait
from stagdist.training.engine.section_engine import build_engine
from stagdist.training.lost_peers import naming_lost_peers
from stagdist.training.saving import resume
from stagdist.training.saving.resume import load_checkpoint, newest_complete
from stagdist.training.saving.save import save_checkpoint
from tests.checkpoint.synthetic import complete, file_contents, training_checkpoint
from tests.ranks import run_ranks
from tests.training.parity_cases import Case
from tests.training.worlds import World

pytestmark = pytest.mark.ranks


def _outcome(action: Callable[[], object]) -> str:
    """The result or the error as text; an error that not all ranks raise is marked."""
    try:
        return f"done: {action()}"
    except StagdistError as error:
        return str(error) if error.everywhere else f"on this rank only: {error}"


def _load(folder: Path, groups: Groups) -> object:
    engine = build_engine(TrainingReader(folder).config, groups)
    return load_checkpoint(engine, groups, TrainingReader(folder).model, folder)


class Watched(Pulse):
    """Records the signs of life."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[Phase] = []

    def beat(self, phase: Phase, step: int | None = None) -> None:
        """Record one."""
        self.phases.append(phase)


def _unseen(checkpoints: Path, groups: Groups) -> str:
    """Rank 1 does not see a file that is there, as on a host that has not mounted the folder."""
    absent = "part_00001.safetensors is missing"
    with patch.object(resume, "damage", lambda *_: absent if groups.place.pipe else None):
        said = _outcome(lambda: newest_complete(checkpoints, groups))
    assert newest_complete(checkpoints, groups) is not None, "it lost its marker"
    return said


def _hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def scenarios(folder: Path) -> dict[str, Any]:
    """All scenarios in one world of two stages."""
    groups = World(120.0).groups((2, 1, 1))
    wrong = folder / "wrong key" / "checkpoints" / checkpoint_name(7)
    found: dict[str, Any] = {"wrong key": _outcome(lambda: _load(wrong, groups))}
    found["older"] = _outcome(lambda: newest_complete(folder / "older" / "checkpoints", groups))
    assert (folder / "older" / "checkpoints" / checkpoint_name(7) / "complete.json").is_file()
    found["unseen"] = _unseen(folder / "unseen" / "checkpoints", groups)
    found["unrecorded"] = _outcome(lambda: newest_complete(folder / "unrecorded" / "checkpoints", groups))
    return found | _exports(folder, groups) | {"lost": _lose_the_other(groups)}


def _lose_the_other(groups: Groups) -> str:
    """Rank 1 does not respond while rank 0 works."""
    limit_s = 3.0
    control = torch.distributed.new_group(timeout=timedelta(seconds=limit_s), backend="gloo")
    if groups.place.pipe:
        return "no answer"
    with pytest.raises(CheckpointError, match="a disk"), naming_lost_peers(groups, limit_s, "resuming"):
        raise CheckpointError("a disk: Connection timed out")
    with pytest.raises(TransportError) as raised, naming_lost_peers(groups, limit_s, "resuming"):
        while_others_wait(control, lambda: time.sleep(1), lambda: None)
    return str(raised.value)


def groups_barrier(groups: Groups) -> None:
    """Wait for all ranks."""
    torch.distributed.barrier(group=groups.control)


def _exports(folder: Path, groups: Groups) -> dict[str, Any]:
    config = Case("stages", {"vocab_size": 258}, (2, 1, 1)).config()
    pulse, tokenizer = Watched(), load_tokenizer("bytes")
    config = config.model_copy(update={"runs_directory": str(folder / "published")})
    engine = build_engine(config, groups, pulse)
    saved = save_checkpoint(engine, groups, config, TrainingState(1, 8, 8, (2, 1, 1), documents_begin=True))

    def leave(directory: Path) -> str:
        said = _outcome(lambda: publish.publish_model(engine, groups, config.model, saved, tokenizer, directory))
        groups_barrier(groups)
        return said

    found: dict[str, Any] = {"export": leave(folder / "models" / "model"), "signs": list(pulse.phases)}
    before = file_contents(folder / "models" / "model")
    found["recorded"] = sorted(read_complete(folder / "models" / "model"))
    found["problems"] = inspect(folder / "models" / "model").problems
    with patch.object(publish.ModelReader, "weight", lambda _, spec: torch.zeros(spec.shape)):
        found["export read back wrong"] = leave(folder / "models" / "model")
    value = publish.TrainingReader.value
    with patch.object(publish.TrainingReader, "value", lambda reader, spec: value(reader, _queries_as_keys(spec))):
        found["export under wrong names"] = leave(folder / "models" / "model")
    theta = config.model.model_copy(update={"rope_theta": 77.0})
    write = model_directory.config_json
    with patch.object(model_directory, "config_json", lambda _, *rest: write(theta, *rest)):
        found["export with another theta"] = leave(folder / "models" / "model")
    found["export over something else"] = leave(folder / "models" / "thesis")
    found["kept"] = file_contents(folder / "models" / "model") == before and _hidden(folder / "models") == []
    return found


def _queries_as_keys(spec: ParameterSpec) -> ParameterSpec:
    """Each of two parameters of one shape under the name of the other."""
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}
    name = re.sub(r"(self_attention\.)([qk]_proj)", lambda found: found[1] + other[found[2]], spec.name)
    return replace(spec, name=name)


@cache
def launched(folder: Path) -> list[dict[str, Any]]:
    """The results of both ranks."""
    wrong = training_checkpoint(folder / "wrong key", {}, (2, 1, 1))
    index = (wrong / "index.json").read_text()
    (wrong / "index.json").write_text(index.replace('"key":"sections.1.', '"key":"sections.9.'))
    complete(wrong)
    older = training_checkpoint(folder / "older", {}, (2, 1, 1))
    state = json.loads((older / "state.json").read_text()) | {"format_version": 1}
    (older / "state.json").write_text(json.dumps(state))
    (older / "index.json").unlink()
    complete(older)
    training_checkpoint(folder / "unseen", {}, (2, 1, 1))
    unrecorded = training_checkpoint(folder / "unrecorded", {}, (2, 1, 1))
    records = read_complete(unrecorded)
    del records["part_00001.safetensors"]
    write_complete(unrecorded, records)
    (folder / "models" / "thesis").mkdir(parents=True)
    (folder / "models" / "thesis" / "chapter.txt").write_text("years of work")
    return run_ranks("tests.training.saving.test_resume_safety:scenarios", 2, folder, timeout_s=150)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of the one launch, by rank."""
    return launched(tmp_path_factory.mktemp("safety"))


def same(reports: list[dict[str, Any]], scenario: str) -> str:
    """The text of a scenario, which must be the same on both ranks."""
    assert reports[0][scenario] == reports[1][scenario]
    return str(reports[0][scenario])


def test_a_damaged_checkpoint_is_refused_on_all_ranks(reports: list[dict[str, Any]]) -> None:
    assert "rank 1: " in same(reports, "wrong key") and "value cannot be read" in same(reports, "wrong key")
    assert same(reports, "unrecorded").startswith("none of the 1 checkpoints in ")


def test_a_checkpoint_of_an_older_release_is_refused_and_stays_as_it_is(reports: list[dict[str, Any]]) -> None:
    assert "stored DeepSpeed's files; export it with that release" in same(reports, "older")


def test_a_rank_that_does_not_see_a_checkpoint_does_not_mark_it_as_damaged(reports: list[dict[str, Any]]) -> None:
    assert "part_00001.safetensors is missing, but rank 0 sees all of it; runs_directory" in same(reports, "unseen")


def test_a_rank_that_does_not_respond_is_reported_in_one_line(
    reports: list[dict[str, Any]],
) -> None:
    assert reports[1]["lost"] == "no answer"
    said = reports[0]["lost"]
    assert said.startswith("stage 0, rank 0, resuming: another rank ended") and "\n" not in said


def test_long_work_of_one_rank_gives_signs_of_life_on_all(reports: list[dict[str, Any]]) -> None:
    parameters = len(model_parameters(Case("stages", {}, (2, 1, 1)).config().model))
    # The engine's forward pass gives other signs in between; work after it must not look like that pass.
    assert all(report["signs"][-1] is Phase.EXPORT for report in reports)
    assert reports[0]["signs"].count(Phase.EXPORT) > 3 * parameters, "while it writes, checks and computes"


def test_the_model_of_a_run_is_read_back_and_replaces_only_an_earlier_one(reports: list[dict[str, Any]]) -> None:
    assert same(reports, "export") == "done: None"
    assert reports[0]["recorded"] == sorted(
        [*CODE_FILES, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
    assert same(reports, "problems") == "[]"
    assert "was not written as it was read" in same(reports, "export read back wrong")
    assert "it is not the model that was trained" in same(reports, "export under wrong names")
    assert "rope_theta was not written as it was read" in same(reports, "export with another theta")
    assert "thesis will not be overwritten" in same(reports, "export over something else")
    assert same(reports, "kept") == "True"
