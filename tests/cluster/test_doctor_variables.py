"""What ranks will get of the environment: read as DeepSpeed reads it, refused where a shell could run it."""

from pathlib import Path

import pytest

from stagdist.cluster.doctor.facts import NOTE, PROBLEM
from stagdist.cluster.doctor.variables import (
    PRIVATE_NAME,
    common_route,
    master_address,
    read_deepspeed_env,
    stale_master,
    write_variables,
)
from stagdist.cluster.hosts.shell_variables import write_deepspeed_env
from stagdist.parallel.private_variables import PRIVATE_FILE, load_private
from tests.cluster.doctor_cases import facts


def test_the_file_in_the_folder_overrules_the_one_at_home(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "folder"
    for place, text in ((home, "NCCL_DEBUG=INFO\nHF_HOME=/a\n"), (folder, "HF_HOME=/b\n")):
        place.mkdir()
        (place / ".deepspeed_env").write_text(text)
    handed = read_deepspeed_env(folder, {"HOME": str(home)})
    assert handed == ({"NCCL_DEBUG": "INFO", "HF_HOME": "/b"}, [])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "DeepSpeed would fail on it"),
        ("# a comment", "DeepSpeed would fail on it"),
        ("export A=1", "DeepSpeed would fail on it"),
        ("HF_HOME=$(touch /tmp/x)", "would split or run"),
        ("HF_HOME=a b", "would split or run"),
        ("X;touch=1", "DeepSpeed would fail on it"),
        ("WANDB_API_KEY=0123", "process lists of all hosts"),
        ("AWS_ACCESS_KEY_ID=0123", "process lists of all hosts"),
        ("MLFLOW_TRACKING_URI=https://u:0123@mlflow", "process lists of all hosts"),
        ("HF_ENDPOINT = https://0123@hub ", "process lists of all hosts"),
    ],
)
def test_a_line_that_harms_is_a_problem_and_is_not_handed_on(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / ".deepspeed_env").write_text(f"A=1\n{line}\nB=2\n")
    variables, (found,) = read_deepspeed_env(tmp_path, {"HOME": str(tmp_path)})
    assert variables == {"A": "1", "B": "2"}
    assert found.level == PROBLEM and "line 2" in found.what and complaint in found.what
    assert "0123" not in str(found)


def test_a_line_with_a_url_without_a_password_is_handed_on(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("HF_ENDPOINT=https://hub:80/a@b\nMLFLOW_TRACKING_PASSWORD=\n")
    handed = read_deepspeed_env(tmp_path, {"HOME": str(tmp_path)})
    assert handed == ({"HF_ENDPOINT": "https://hub:80/a@b", "MLFLOW_TRACKING_PASSWORD": ""}, [])


def test_what_deepspeed_would_show_by_itself_is_noted_until_the_file_replaces_it(tmp_path: Path) -> None:
    shell = {"HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "https://u:0123@h", "NCCL_X": "a b", "UCX_TLS": "tcp"}
    for text, noted in (("A=1\n", "MLFLOW_TRACKING_URI, NCCL_X"), ("MLFLOW_TRACKING_URI=\n", "NCCL_X")):
        (tmp_path / ".deepspeed_env").write_text(text)
        _, (found,) = read_deepspeed_env(tmp_path, shell)
        assert found.level == NOTE and found.what.endswith(f" {noted}") and "0123" not in str(found)
    write_deepspeed_env(tmp_path / ".deepspeed_env", tmp_path / PRIVATE_NAME, shell)
    assert read_deepspeed_env(tmp_path, shell)[1] == []


def test_without_a_file_the_variables_that_stay_behind_are_noted(tmp_path: Path) -> None:
    shell = {"HOME": str(tmp_path), "PATH": "/bin", "NCCL_DEBUG": "INFO", "HF_HOME": "/a", "WANDB_API_KEY": "k"}
    _, (found,) = read_deepspeed_env(tmp_path, shell)
    # DeepSpeed hands on NCCL's by itself.
    assert found.level == NOTE and found.what.endswith("will not see HF_HOME, WANDB_API_KEY")
    assert read_deepspeed_env(tmp_path, {"HOME": str(tmp_path), "PATH": "/bin"})[1] == []


def test_the_written_file_is_read_back_and_secrets_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    monkeypatch.setenv("WANDB_BASE_URL", "https://u:0123@wandb")
    monkeypatch.setenv("HF_HOME", "/a folder")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    names = write_variables(tmp_path / ".deepspeed_env", "node1", "eth0")
    variables, findings = read_deepspeed_env(tmp_path, {"HOME": str(tmp_path)})
    assert {"WANDB_API_KEY", "HF_HOME", "GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT"} <= set(names)
    assert findings == [] and "0123" not in (tmp_path / ".deepspeed_env").read_text()
    assert variables["MASTER_ADDR"] == "node1"
    assert variables["GLOO_SOCKET_IFNAME"] == "eth0"
    assert variables["NCCL_SOCKET_IFNAME"] == "ib0"  # what the shell says counts more
    there = dict(variables)
    assert there[PRIVATE_FILE] == str(tmp_path / PRIVATE_NAME)
    load_private(there)
    assert (there["WANDB_API_KEY"], there["HF_HOME"]) == ("0123", "/a folder")
    assert there["WANDB_BASE_URL"] == "https://u:0123@wandb"


def test_both_files_are_kept_out_of_git() -> None:
    ignored = (Path(__file__).parents[2] / ".gitignore").read_text().split()
    assert {".deepspeed_env", PRIVATE_NAME} <= set(ignored)


def test_the_first_host_is_called_as_the_others_reach_it() -> None:
    healthy = {f"node{number}": facts(number) for number in (1, 2)}
    assert master_address(["node1", "node2"], healthy) == "node1"
    own = {"node1": "127.0.1.1", "node2": "10.0.0.2"}
    assert master_address(["node1", "node2"], healthy | {"node1": facts(1, addresses=own)}) == "10.0.0.1"


def test_a_file_that_names_another_first_host_is_a_problem() -> None:
    known = {"node1": facts(1), "node2": facts(2)}
    for told in ({}, {"MASTER_ADDR": "node1"}, {"MASTER_ADDR": "10.0.0.1"}):
        assert stale_master(told, ["node1", "node2"], known) == []
    (found,) = stale_master({"MASTER_ADDR": "node9"}, ["node1", "node2"], known)
    assert found.level == PROBLEM and "node9" in found.what


def test_the_interface_is_common_only_where_all_call_it_alike() -> None:
    assert common_route([facts(1), facts(2)]) == "eth0"
    assert common_route([facts(1), facts(2, route="ens1")]) is None
    assert common_route([facts(1, route=None), facts(2, route=None)]) is None
