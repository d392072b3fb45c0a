"""Variables reach the ranks whole, and never as a command of the shell that carries them."""

import argparse
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from stagdist.cluster.environment import join_launcher
from stagdist.cluster.exports import PRIVATE_FILE, load_private, wanted, write_deepspeed_env
from stagdist.errors import ConfigError

NASTY = 'a\'b "c" $(touch hit) `touch hit` ; touch hit & %h\n#\\'


def arrived(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank sees after DeepSpeed's pdsh runner has put the file into the shell command of a host."""
    write_deepspeed_env(folder / ".deepspeed_env", folder / "private", environment)
    arguments = argparse.Namespace(user_args=[], user_script="x", launcher="pdsh")
    runner = PDSHRunner(arguments, "")
    for line in (folder / ".deepspeed_env").read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    shell = ["/bin/sh", "-c", f"{exports}/usr/bin/env -0"]
    told = subprocess.run(shell, cwd=folder, env={}, capture_output=True, text=True, check=True).stdout
    found = dict(entry.split("=", maxsplit=1) for entry in told.rstrip("\0").split("\0"))
    load_private(found)
    return found


def test_what_ranks_need_is_chosen_and_what_is_of_this_host_alone_is_not() -> None:
    shell = {
        "PATH": "/bin", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        "WANDB_API_KEY": "k", "https_proxy": "http://u:p@h", "MY_TOKEN": "t", "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0", "PS1": "$ ", "BASH_FUNC_x%%": "() { :; }", "DS_ENV_FILE": "x",
        "SSH_AUTH_SOCK": "/x",
    }  # fmt: skip
    assert sorted(wanted(shell)) == [
        "GLOO_SOCKET_IFNAME", "MY_TOKEN", "NCCL_DEBUG", "OMP_NUM_THREADS", "PATH", "WANDB_API_KEY", "https_proxy",
    ]  # fmt: skip


def test_plain_values_arrive_through_deepspeeds_command_line(tmp_path: Path) -> None:
    shell = {"PATH": "/a/bin:/usr/bin", "NCCL_SOCKET_IFNAME": "eth0,eth1", "OMP_NUM_THREADS": "4", "TORCH_LOGS": ""}
    found = arrived(tmp_path, shell)
    assert {name: found[name] for name in shell} == shell
    assert PRIVATE_FILE not in found and not (tmp_path / "private").exists()


def test_values_with_shell_characters_arrive_whole_and_run_nothing(tmp_path: Path) -> None:
    shell = {"WANDB_NOTES": NASTY, "WANDB_NAME": "50 %", "NCCL_DEBUG": "INFO"}
    found = arrived(tmp_path, shell)
    assert {name: found[name] for name in shell} == shell
    assert not (tmp_path / "hit").exists()


def test_secrets_travel_in_a_file_of_their_owner_and_nowhere_else(tmp_path: Path) -> None:
    shell = {"WANDB_API_KEY": "plainlooking", "HF_TOKEN": "hf_x", "NCCL_DEBUG": "INFO"}
    found = arrived(tmp_path, shell)
    assert {name: found[name] for name in shell} == shell
    assert "plainlooking" not in (tmp_path / ".deepspeed_env").read_text()
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["PATH", "PYTHONPATH", "LD_LIBRARY_PATH"])
def test_what_python_needs_to_start_must_be_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} holds characters"):
        write_deepspeed_env(tmp_path / "e", tmp_path / "p", {name: "/x:$(touch hit)"})
    assert not list(tmp_path.iterdir())


def test_a_private_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.write_text("HF_TOKEN=x\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="by others"):
        join_launcher({PRIVATE_FILE: str(path)})


@pytest.mark.parametrize("content", ["no assignment\n", "'HF_TOKEN=x", "1A=2\n"])
def test_a_damaged_private_file_is_refused_without_its_content(tmp_path: Path, content: str) -> None:
    path = tmp_path / "private"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="damaged|cannot be read") as caught:
        load_private({PRIVATE_FILE: str(path)})
    assert "HF_TOKEN" not in str(caught.value)


def test_the_private_file_gives_way_to_what_is_set(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.write_text("WANDB_NAME='a b'\nHF_TOKEN=file\n")
    path.chmod(0o600)
    environment = {PRIVATE_FILE: str(path), "HF_TOKEN": "set"}
    load_private(environment)
    assert environment["WANDB_NAME"] == "a b" and environment["HF_TOKEN"] == "set"


def test_the_mark_and_the_pulse_of_an_outer_job_are_not_handed_on() -> None:
    assert wanted({"STAGDIST_JOB": "outer.1", "STAGDIST_PULSE": "/tmp/pulse", "STAGDIST_X": "1"}) == {"STAGDIST_X": "1"}
