"""Variables reach the ranks whole, and never as a command of the shell that carries them."""

import argparse
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import EXPORT_ENVS

from stagdist.cluster.hosts.shell_variables import (
    EXPORTED_BY_DEEPSPEED,
    PREFIXES,
    rank_variables,
    split_private,
    write_deepspeed_env,
)
from stagdist.errors import ConfigError
from stagdist.parallel.private_variables import PRIVATE_FILE, load_private
from stagdist.parallel.world import join_launcher

NASTY = 'a\'b "c" $(touch hit) `touch hit` ; touch hit & %h\n#\\'
WITH_PASSWORD = "https://u:PaSsW0rd@mlflow:5000"


def shell_line(folder: Path, environment: Mapping[str, str]) -> str:
    """What DeepSpeed's pdsh runner, started in this environment, puts before the command of a host."""
    write_deepspeed_env(folder / ".deepspeed_env", folder / "private", environment)
    arguments = argparse.Namespace(user_args=[], user_script="x", launcher="pdsh")
    runner = PDSHRunner(arguments, "")
    for name, value in environment.items():
        if name.startswith((*EXPORT_ENVS, "NCCL")):
            runner.add_export(name, value)
    for line in (folder / ".deepspeed_env").read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    return "".join(f"export {name}={value}; " for name, value in runner.exports.items())


def arrived(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank sees after DeepSpeed's pdsh runner has put the file into the shell command of a host."""
    shell = ["/bin/sh", "-c", f"{shell_line(folder, environment)}/usr/bin/env -0"]
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
    assert sorted(rank_variables(shell)) == [
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


@pytest.mark.parametrize(
    "name",
    [
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY",
        "AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING",
        "X_ACCESS_KEYS", "X_STORAGE_KEYS", "X_ACCOUNT_KEYS", "X_PASSWORDS", "X_TOKENS", "X_APIKEYS", "https_proxy",
    ],
)  # fmt: skip
def test_what_opens_a_store_or_a_service_is_handed_on_in_private(name: str) -> None:
    assert split_private(rank_variables({name: "plain"})) == ({}, {name: "plain"})


def test_the_parts_of_a_key_travel_together(tmp_path: Path) -> None:
    shell = {"AWS_ACCESS_KEY_ID": "AKIA0", "AWS_SECRET_ACCESS_KEY": "s3cr/t", "AWS_SESSION_TOKEN": "t0ken=="}
    found = arrived(tmp_path, shell)
    assert {name: found[name] for name in shell} == shell
    assert (tmp_path / ".deepspeed_env").read_text() == f"{PRIVATE_FILE}={tmp_path / 'private'}\n"


@pytest.mark.parametrize("name", ["WANDB_PASSPHRASE", "MLFLOW_AUTH", "HF_AUTHS", "MLFLOW_CRYPTO_KEYS", "WANDB_DB_PASS"])
def test_a_name_that_sounds_secret_is_not_shown(name: str) -> None:
    assert split_private(rank_variables({name: "plain"})) == ({}, {name: "plain"})


@pytest.mark.parametrize(
    "name",
    [
        "KEYBOARD", "KEY", "XAUTHORITY", "XAUTH", "SSH_AUTH_SOCK", "SSH_ASKPASS", "GPG_KEY", "MONKEY", "NPM_AUTH",
        "BORG_PASSPHRASE", "PWD", "OLDPWD", "TOKENIZER", "SECRETARY", "DATABASE_CONNECTION_STRING",
    ],
)  # fmt: skip
def test_what_ranks_do_not_need_stays_behind_whatever_it_is_called(name: str) -> None:
    assert rank_variables({name: "plain"}) == {}


def test_a_password_in_a_value_is_no_reason_to_hand_it_on() -> None:
    assert rank_variables({"PIP_INDEX_URL": WITH_PASSWORD, "DATABASE_URL": "postgresql://u:p@h/d"}) == {}


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "WANDB_BASE_URL", "HF_ENDPOINT", "NCCL_X", "STAGDIST_X"])
@pytest.mark.parametrize(
    "value",
    [
        WITH_PASSWORD, "http://token@h", "redis://:PaSsW0rd@h/0", "postgresql+psycopg2://u:p/w@h/db",
        "https://u:p@ss@h", "tcp://a:1,tcp://u:p@b:2", "file:https://u:p@h",
    ],
)  # fmt: skip
def test_a_url_with_a_password_is_hidden_whatever_its_variable_is_called(name: str, value: str) -> None:
    assert split_private(rank_variables({name: value})) == ({}, {name: value})


@pytest.mark.parametrize(
    "value",
    [
        "https://mlflow.example.org:5000/a/b", "https://h/models@main", "sqlite:////data/a@b.db",
        "tcp://10.0.0.1:29500", "me@example.org", "https://@h", "",
    ],
)  # fmt: skip
def test_a_url_without_a_password_stays_public(value: str) -> None:
    public, private = split_private({"MLFLOW_TRACKING_URI": value})
    assert (public, private) == ({"MLFLOW_TRACKING_URI": value}, {})


def test_what_deepspeed_hands_on_by_itself_is_replaced_where_it_must_not_be_seen(tmp_path: Path) -> None:
    shell = {
        "MLFLOW_TRACKING_URI": WITH_PASSWORD, "MLFLOW_TRACKING_PASSWORD": "PaSsW0rd", "PYTHON_KEYRING_X": WITH_PASSWORD,
        "NCCL_X": NASTY, "UCX_TLS": "tcp", "HF_ENDPOINT": WITH_PASSWORD,
    }  # fmt: skip
    line = shell_line(tmp_path, shell)
    assert "PaSsW0rd" not in line and "touch" not in line and "export UCX_TLS=tcp;" in line
    found = arrived(tmp_path, shell)
    assert {name: found[name] for name in shell} == shell
    assert not (tmp_path / "hit").exists()


def test_all_that_deepspeed_hands_on_by_itself_is_known_and_reaches_ranks_by_our_files() -> None:
    assert {*EXPORT_ENVS, "NCCL"} <= set(EXPORTED_BY_DEEPSPEED) <= set(PREFIXES)


@pytest.mark.parametrize("name", ["PATH", "PYTHONPATH", "LD_LIBRARY_PATH"])
def test_a_password_that_would_be_needed_to_start_is_refused_without_being_shown(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} holds a URL with a password") as caught:
        write_deepspeed_env(tmp_path / "e", tmp_path / "p", {name: f"/x:{WITH_PASSWORD}"})
    assert "PaSsW0rd" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_secret_of_pythons_tools_may_hold_anything() -> None:
    shell = {"PYTHON_KEYRING_PASSWORD": NASTY, "PYTHON_X_URL": f"{WITH_PASSWORD}?a b"}
    assert split_private(rank_variables(shell)) == ({}, shell)


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
    environment = {PRIVATE_FILE: str(path), "HF_TOKEN": "set", "WANDB_NAME": ""}
    load_private(environment)
    assert environment["WANDB_NAME"] == "a b" and environment["HF_TOKEN"] == "set"


def test_the_mark_and_the_pulse_of_an_outer_job_are_not_handed_on() -> None:
    assert rank_variables({"STAGDIST_JOB": "outer.1", "STAGDIST_PULSE": "/tmp/pulse", "STAGDIST_X": "1"}) == {
        "STAGDIST_X": "1"
    }
