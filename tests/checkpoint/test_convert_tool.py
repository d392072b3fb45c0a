"""tools/convert_checkpoint.py as people call it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagdist.checkpoint.sources import find
from stagdist.errors import CheckpointError
from tests.checkpoint.synthetic import model_directory, training_checkpoint

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
    assert "so are the logits on 32 tokens of text" in exported.stdout
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


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    size = {"hidden_size": 256, "intermediate_size": 1024, "section_layers": [4, 4]}
    training_checkpoint(tmp_path / "run", size, (1, 1, 1))
    target = tmp_path / "moved"
    arguments: list[str | Path] = ["reshard", tmp_path / "run", target, "--pipe", "2", "--tensor", "2"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(target.rglob("mp_rank_*")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not list(target.rglob("complete.json")) and not (target / "checkpoints" / "step_00000007").exists()
    with pytest.raises(CheckpointError):
        find(target)

    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (target / "checkpoints").iterdir()] == ["step_00000007"]
