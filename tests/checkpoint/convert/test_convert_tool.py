"""tools/convert_checkpoint.py as people call it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from stagdist.checkpoint.convert import import_model, model_conversions
from stagdist.checkpoint.convert.find import find, open_weights
from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.verify import verify
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.errors import CheckpointError
from tests.checkpoint.synthetic import file_contents, model_directory, training_checkpoint
from tests.ranks import RankError, run_ranks, run_script

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
VERBS = ("export", "import", "upcycle", "split", "merge", "inspect", "verify")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the tool."""
    return run_script(TOOL, *arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    shown = run(verb, "--help")
    assert shown.returncode == 0 and f"tools/convert_checkpoint.py {verb} " in shown.stdout.split("example:")[1]


def test_a_checkpoint_goes_through_the_verbs(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {}, (2, 1, 2))
    exported = run("export", tmp_path / "run", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    assert "tensors are bit-equal" in exported.stdout
    words = [sys.executable, str(TOOL), "verify", str(tmp_path / "run"), str(tmp_path / "model"), "--json"]
    same = subprocess.run(words, capture_output=True, text=True, timeout=120)  # a process that imports all it needs
    assert same.stderr == "", "no warnings of frameworks that a comparison does not need"
    assert same.returncode == 0 and json.loads(same.stdout)["largest_difference"] == 0.0, same.stdout

    other = model_directory(tmp_path / "other", {}, seed=8)
    different = run("verify", tmp_path / "model", other)
    assert different.returncode == 1 and different.stdout.startswith("DIFFERENT: largest difference of a logit ")
    facts = run("inspect", tmp_path / "run", "--json")
    assert facts.returncode == 0 and json.loads(facts.stdout)["grid"] == {"pipe": 2, "data": 1, "tensor": 2}
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    broken = run("inspect", tmp_path / "model")
    assert broken.returncode == 1 and "PROBLEM: " in broken.stdout
    refused = run("import", tmp_path / "model", tmp_path / "again")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr


@pytest.mark.parametrize("tolerance", ["-1", "nan"])
def test_a_tolerance_that_is_no_difference_is_refused(tolerance: str, tmp_path: Path) -> None:
    refused = run("verify", tmp_path, tmp_path, "--tolerance", tolerance)
    assert refused.returncode == 2 and f"{tolerance} is no difference; give 0 or more" in refused.stderr


HOOKS: dict[str, tuple[Any, str]] = {
    "writing": (ModelDirectoryWriter, "commit"),
    "proving": (model_conversions, "require_same"),
    "importing": (import_model, "require_same"),
}
"""Function before which a process is killed, by stage of the conversion."""


def convert_until_killed(payload: tuple[str, str, dict[str, Any]]) -> None:
    """Run a conversion on a rank that kills itself at a hook."""
    stage, verb, keys = payload
    with patch.object(*HOOKS[stage], lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
        if verb == "export":
            export(**keys)
        else:
            import_model.import_model(**keys)


def kill(stage: str, verb: str, **keys: Any) -> None:
    """Run a conversion in a process that is killed at a stage."""
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks("tests.checkpoint.convert.test_convert_tool:convert_until_killed", 1, (stage, verb, keys))


def test_a_killed_import_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    target = tmp_path / "run"
    keys: dict[str, Any] = {"source": model_directory(tmp_path / "model", {}), "destination": target}
    keys |= {"config_file": None, "options": ConversionOptions()}
    kill("importing", "import", **keys)
    assert list(target.rglob("part_*")), "files were written before it was killed"
    assert not (target / "checkpoints" / "step_00000000").exists()
    with pytest.raises(CheckpointError):
        find(target)

    import_model.import_model(**keys)
    assert [path.name for path in (target / "checkpoints").iterdir()] == ["step_00000000"]


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("stage", ["writing", "proving"])
def test_a_killed_export_leaves_nothing_that_looks_complete(tmp_path: Path, stage: str, replaces: bool) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    published = tmp_path / "published"
    before = file_contents(model_directory(published / "model", {}, seed=9)) if replaces else {}
    keys: dict[str, Any] = {"source": tmp_path / "run", "destination": published / "model"}
    options = ConversionOptions(overwrite=replaces)
    kill(stage, "export", **keys, options=options)
    hidden = published / ".converting-model" / "model"
    assert (hidden / "model.safetensors").is_file()
    if replaces:
        assert file_contents(published / "model") == before, "the old directory stays until the new one is proved"
        assert find(published / "model").directory == published / "model"
    else:
        assert not (published / "model").exists()
        for path in (published / "model", published):
            with pytest.raises(CheckpointError, match="is no directory|holds neither checkpoints nor a model"):
                open_weights(path)
    if stage == "writing":
        with pytest.raises(CheckpointError, match="holds neither checkpoints nor a model"):
            open_weights(hidden)

    export(**keys, options=options)
    assert [path.name for path in published.iterdir()] == ["model"]
    assert inspect(published / "model").problems == []
    assert verify(tmp_path / "run", published / "model").largest_difference == 0.0
