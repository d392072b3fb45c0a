"""tools/convert_checkpoint.py as people call it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stagdist.checkpoint.convert.find import find, open_weights
from stagdist.checkpoint.convert.inspection import inspect
from stagdist.checkpoint.convert.verify import verify
from stagdist.errors import CheckpointError
from tests.checkpoint.synthetic import file_contents, model_directory, training_checkpoint

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
VERBS = ("export", "import", "reshard", "upcycle", "split", "merge", "inspect", "verify")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the tool."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    shown = run(verb, "--help")
    assert shown.returncode == 0 and f"tools/convert_checkpoint.py {verb} " in shown.stdout.split("example:")[1]


def test_a_checkpoint_goes_through_the_verbs(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {}, (2, 1, 2))
    exported = run("export", tmp_path / "run", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    assert "tensors are bit-equal" in exported.stdout
    same = run("verify", tmp_path / "run", tmp_path / "model", "--json")
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


LARGE = {"hidden_size": 256, "intermediate_size": 1024, "section_layers": [4, 4]}
"""Large enough to be killed while it is written."""


def kill(arguments: Sequence[str | Path], when: Callable[[], object]) -> None:
    """Start the tool and kill it as soon as `when` holds."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not when():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", LARGE, (1, 1, 1))
    target = tmp_path / "moved"
    arguments: list[str | Path] = ["reshard", tmp_path / "run", target, "--pipe", "2", "--tensor", "2"]
    kill(arguments, lambda: list(target.rglob("mp_rank_*")))
    assert not list(target.rglob("complete.json")) and not (target / "checkpoints" / "step_00000007").exists()
    with pytest.raises(CheckpointError):
        find(target)

    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (target / "checkpoints").iterdir()] == ["step_00000007"]


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("sign", [".model.part/model.safetensors", "model/config.json"], ids=["writing", "proving"])
def test_a_killed_export_leaves_nothing_that_looks_complete(tmp_path: Path, sign: str, replaces: bool) -> None:
    training_checkpoint(tmp_path / "run", LARGE, (1, 1, 1))
    published = tmp_path / "published"
    before = file_contents(model_directory(published / "model", {})) if replaces else {}
    arguments: list[str | Path] = ["export", tmp_path / "run", published / "model", *["--overwrite"] * replaces]
    hidden = published / ".converting-model"
    kill(arguments, (hidden / sign).is_file)
    assert hidden.is_dir()
    if replaces:
        assert file_contents(published / "model") == before, "what was there stays until the new one is proved"
        assert find(published / "model").directory == published / "model"
    else:
        assert not (published / "model").exists()
        for path in (published / "model", published):
            with pytest.raises(CheckpointError, match="is no directory|holds neither checkpoints nor a model"):
                open_weights(path)
    if (hidden / ".model.part").exists():  # a slow kill may come after it
        with pytest.raises(CheckpointError, match="holds neither checkpoints nor a model"):
            open_weights(hidden / ".model.part")

    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in published.iterdir()] == ["model"]
    assert inspect(published / "model").problems == []
    assert verify(tmp_path / "run", published / "model").largest_difference == 0.0
