"""`launch/doctor.py` as typed: exit codes, the report, the JSON, the written files."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_script

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = ROOT / "launch" / "doctor.py"


def doctor(folder: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    shell = {**os.environ, "DS_ACCELERATOR": "cpu", **variables}
    return subprocess.run(
        [sys.executable, str(DOCTOR), *words], cwd=folder, env=shell, capture_output=True, text=True, timeout=240
    )


@pytest.mark.ranks
def test_this_machine_alone_is_examined_and_everything_is_written(tmp_path: Path) -> None:
    words = ["--write-mib", "8", "--json", "doctor.json", "--checkpoints", "kept", "--write-env"]
    done = doctor(tmp_path, *words, WANDB_API_KEY="hunter2")
    body = json.loads((tmp_path / "doctor.json").read_text())
    problems = [finding for finding in body["findings"] if finding["level"] == "problem"]
    assert problems == [] and done.returncode == body["exit_code"] == 0, done.stdout + done.stderr
    assert done.stdout.endswith("verdict: fine\n")
    measured = body["links"]
    assert (measured["grid"], measured["backend"], measured["devices"]) == ([2, 1, 1], "gloo", ["cpu", "cpu"])
    assert [(one["axis"], one["ranks"], one["correct"]) for one in measured["links"]] == [
        ("pipe", [0, 1], True), ("all", [0, 1], True),
    ]  # fmt: skip
    assert all(0 < one["latency_s"] < 1 and one["bytes_s"] > 1e6 for one in measured["links"])
    assert body["facts"]["localhost"]["storage"]["write_mb_s"] > 0
    assert not (tmp_path / "kept").exists()
    private = tmp_path / ".stagdist_private_env"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600 and "hunter2" in private.read_text()
    assert "WANDB_API_KEY" in done.stderr
    for text in (done.stdout, done.stderr, (tmp_path / ".deepspeed_env").read_text(), json.dumps(body)):
        assert "hunter2" not in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--hostfile", "nowhere"], "hostfile nowhere cannot be read"),
        (["--hostfile", "evil"], "refused"),
        (["--hostfile", "hostfile", "--num-ranks", "3"], "belongs to this machine alone"),
        (["--num-ranks", "0"], "--num-ranks must be at least 1 and at most 1000000, got 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--json", "no/folder.json"], "there is no folder no"),
        (["--write-env", "no/env"], "--write-env no/env: there is no folder no"),
        (["--set", "name=x"], "--set changes the configuration of --config FILE"),
        (["--config", str(ROOT / "configs" / "quickstart.yaml"), "--num-ranks", "3"], "3"),
    ],
)
def test_what_cannot_start_ends_with_two_and_one_line(tmp_path: Path, words: list[str], complaint: str) -> None:
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    (tmp_path / "evil").write_text("node1 slots=1\n$(touch${IFS}owned) slots=1\n")
    with contextlib.chdir(tmp_path):
        done = run_script(DOCTOR, *words)
    assert done.returncode == 2 and complaint in done.stderr.splitlines()[-1], done.stderr
    assert done.stdout == "" and not (tmp_path / "owned").exists()


def test_hosts_that_do_not_answer_are_findings_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("nobody-1.invalid slots=1\n#spare nobody-2.invalid slots=1\n")
    done = doctor(tmp_path, "--hostfile", "hostfile", "--json", "doctor.json")
    assert done.returncode == 1, done.stderr
    assert "nobody-1.invalid: does not answer ssh" in done.stdout and "links were not measured" in done.stdout
    assert sorted(json.loads((tmp_path / "doctor.json").read_text())["silent"]) == [
        "nobody-1.invalid", "nobody-2.invalid",
    ]  # fmt: skip


def test_help_tells_the_exit_codes(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--help")
    assert done.returncode == 0 and "Exit code: 0 fine, 1 problems found, 2" in done.stdout
