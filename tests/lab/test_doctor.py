"""The doctor on real hosts: a healthy lab passes, and each planted fault is found on its host."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.hosts import Lab
from tests.lab.wiring import ROOT

pytestmark = pytest.mark.lab
DOCTOR = [sys.executable, str(ROOT / "launch" / "doctor.py")]
VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
BOTH = "node1 slots=1\nnode2 slots=1\n"


def doctor(
    lab: Lab, folder: Path, *words: str, hostfile: str = BOTH, variables: dict[str, str] | None = None
) -> tuple[int, str, dict[str, Any]]:
    """Run it on node1: exit code, output, and the JSON (empty where it came to none)."""
    (folder / "hostfile").write_text(hostfile)
    result = folder / "doctor.json"
    result.unlink(missing_ok=True)
    command = [*DOCTOR, "--hostfile", "hostfile", "--json", str(result), "--checkpoints", "kept", "--write-mib", "8"]
    code, text = lab.run("node1", [*command, *words], cwd=folder, env=VARIABLES | (variables or {}), timeout_s=240)
    return code, text, json.loads(result.read_text()) if result.exists() else {}


def problems(body: dict[str, Any], row: str) -> list[Sequence[str]]:
    return [one["hosts"] for one in body["findings"] if (one["level"], one["row"]) == ("problem", row)]


def test_a_healthy_lab_passes(clean_lab: Lab, tmp_path: Path) -> None:
    code, text, body = doctor(clean_lab, tmp_path, "--write-env", hostfile=BOTH.replace("slots=1", "slots=2"))
    assert (code, body["exit_code"]) == (0, 0), text
    assert text.rstrip().endswith("verdict: fine")
    assert all(fact["storage"]["shared"] and fact["route"] == "eth0" for fact in body["facts"].values())
    assert all(abs(fact["clock_offset_s"]) <= fact["clock_error_s"] + 0.05 for fact in body["facts"].values())
    measured = body["links"]
    assert measured["hosts"] == ["node1", "node1", "node2", "node2"] and measured["grid"] == [2, 2, 1]
    assert sorted((one["axis"], one["ranks"]) for one in measured["links"]) == [
        ("all", [0, 1, 2, 3]), ("data", [0, 1]), ("data", [2, 3]), ("pipe", [0, 2]), ("pipe", [1, 3]),
    ]  # fmt: skip
    assert all(one["correct"] for one in measured["links"])
    assert not (tmp_path / "kept").exists() and clean_lab.processes() == []


def test_a_host_without_power_is_a_finding_within_seconds(clean_lab: Lab, tmp_path: Path) -> None:
    clean_lab.power_off("node2")
    code, text, body = doctor(clean_lab, tmp_path)
    assert code == 1 and problems(body, "answers") == [["node2"]], text
    assert "links were not measured: node2 did not answer" in text
    assert list(body["facts"]) == ["node1"]


def test_every_planted_problem_is_found_and_shell_characters_run_nothing(clean_lab: Lab, tmp_path: Path) -> None:
    for line in ("$(touch${IFS}owned) slots=1", "node2;touch${IFS}owned slots=1", "-oProxyCommand=touch slots=1"):
        code, text, _ = doctor(clean_lab, tmp_path, hostfile=f"node1 slots=1\n{line}\n")
        assert code == 2 and "refused" in text, text
    clean_lab.name_hosts(loopback=True)
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=$(touch owned)\nTZ=`touch owned`\n")
    harmful = {"NCCL_DEBUG_FILE": "$(touch owned)", "UCX_TLS": "tcp;touch owned"}
    kept = tmp_path / "kept"
    kept.mkdir()
    assert clean_lab.run("node2", ["mount", "-t", "tmpfs", "tmpfs", str(kept)])[0] == 0
    try:
        code, text, body = doctor(clean_lab, tmp_path, variables=harmful)
        assert clean_lab.run("node2", ["ls", "-A", str(kept)]) == (0, "")
    finally:
        clean_lab.run("node2", ["umount", str(kept)])
    assert code == 1 and problems(body, "shared") == [["node2"]], text
    assert body["facts"]["node2"]["storage"]["kind"] == "tmpfs" and list(kept.iterdir()) == []
    assert problems(body, "interface") == [["node1"], ["node2"]], text
    assert "GLOO_SOCKET_IFNAME=eth0" in text and len(body["links"]["links"]) == 2
    assert len(problems(body, "environment")) == 2, text
    for place in (tmp_path, ROOT, clean_lab.folder / "home"):
        assert not (place / "owned").exists()


def test_the_written_file_corrects_names_that_mean_loopback_and_a_slow_network_is_noted(
    clean_lab: Lab, tmp_path: Path
) -> None:
    clean_lab.name_hosts(loopback=True)
    secret = {"WANDB_API_KEY": "hunter2", "GREETING": "$(touch owned)", "HF_HOME": "$(touch owned)"}
    code, text, body = doctor(clean_lab, tmp_path, "--write-env", variables=secret)
    assert code == 0 and "hunter2" not in text, text
    lines = (tmp_path / ".deepspeed_env").read_text().splitlines()
    assert {"GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0", "MASTER_ADDR=10.77.0.1"} <= set(lines)
    assert not any("owned" in line or "hunter2" in line for line in lines)

    slowed = clean_lab.run("node2", "tc qdisc add dev eth0 root tbf rate 20mbit burst 32kbit latency 400ms")[0] == 0
    try:
        code, text, body = doctor(clean_lab, tmp_path)  # in a shell without them, reading the file
    finally:
        clean_lab.run("node2", "tc qdisc del dev eth0 root")
    assert (code, body["interface"]) == (0, "eth0"), text
    assert not list(tmp_path.rglob("owned"))
    if not slowed:
        pytest.skip("this kernel cannot slow a network down: no tbf")
    assert "1 stage boundaries are slower than gigabit Ethernet" in text, text
    assert [(one["axis"], one["bytes_s"] < 3e6) for one in body["links"]["links"]] == [("pipe", True), ("all", True)]


def test_a_working_folder_that_a_host_lacks_is_a_problem(clean_lab: Lab, tmp_path: Path) -> None:
    # /run is every host's own.
    clean_lab.run("node1", "mkdir -p /run/only-here && echo 'node1 slots=1\nnode2 slots=1' > /run/only-here/hostfile")
    words = ["--hostfile", "hostfile", "--checkpoints", str(tmp_path), "--write-mib", "4"]
    code, text = clean_lab.run("node1", [*DOCTOR, *words], cwd=Path("/run/only-here"), env=VARIABLES, timeout_s=240)
    assert code == 1 and "node2: the folder from which you start does not exist there" in text, text
