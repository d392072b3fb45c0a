"""How a program is started on a host: quoted whatever it holds, secrets apart, this machine directly."""

import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from stagdist.cluster.hosts import reach
from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.leftovers import JOB_VARIABLE
from stagdist.cluster.hosts.reach import (
    address_of,
    choose_way,
    early_variables,
    is_this_machine,
    start_command,
)
from stagdist.cluster.hosts.remote import Finished
from stagdist.errors import ConfigError

WITH_PASSWORD = "https://u:PaSsW0rd@mlflow:5000"
NASTY = "/a b;$(touch hit)"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the shell, secret ones among them."""
    for name in list(os.environ):
        if name.startswith(("PYTHON", "LD_", "SLURM")):
            monkeypatch.delenv(name)
    for name, value in {"PYTHONPATH": NASTY, "WANDB_API_KEY": "s3cret", "HF_HOME": "/hf", "PATH": "/bin"}.items():
        monkeypatch.setenv(name, value)


def test_ssh_gets_one_line_that_runs_nothing_else(shell: None, tmp_path: Path) -> None:
    folder = tmp_path / "a folder; touch hit"
    folder.mkdir()
    words = ("/usr/bin/env", "-0")
    command = start_command("no.such.host", "ssh", words, folder, "run.1", 60.0)
    assert command.words[0] == "ssh" and "no.such.host" in command.words and "ServerAliveCountMax=12" in command.words
    printed = subprocess.run(["/bin/sh", "-c", command.words[-1]], env={}, capture_output=True, text=True, check=True)
    found = dict(entry.split("=", 1) for entry in printed.stdout.rstrip("\0").split("\0"))
    own = {name: value for name, value in found.items() if name not in ("PWD", "OLDPWD")}
    assert own == {
        "PATH": "/bin",
        "PYTHONPATH": NASTY,
        JOB_VARIABLE: "run.1",
    }
    assert not list(tmp_path.rglob("hit")) and "s3cret" not in str(command.words)


def test_srun_starts_one_task_on_the_node_with_all_variables_but_its_own_options(
    shell: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    monkeypatch.setenv("SLURM_LABELIO", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    command = start_command("no.such.host", "srun", ("python", "x"), Path("/a b"), "run.1", 60.0)
    assert {"--nodes=1", "--ntasks=1", "--overlap", "--nodelist=no.such.host", "--chdir=/a b"} <= set(command.words)
    assert command.words[-4:] == ("env", f"{JOB_VARIABLE}=run.1", "python", "x")
    assert command.environment["WANDB_API_KEY"] == "s3cret" and "s3cret" not in str(command.words)
    assert {name for name in command.environment if name.startswith("SLURM_")} == {"SLURM_JOB_ID"}
    assert JOB_VARIABLE not in command.environment, "srun itself is not a process of the run on this machine"


@pytest.mark.parametrize("way", ["ssh", "srun"])
def test_this_machine_is_reached_directly(way: reach.StartWay) -> None:
    command = start_command(socket.gethostname(), way, ("python", "x"), Path("/work"), "run.1", 60.0)
    assert (command.words, command.folder) == (("python", "x"), Path("/work"))
    assert command.environment[JOB_VARIABLE] == "run.1"


def test_this_machine_has_its_name_and_its_addresses() -> None:
    assert is_this_machine("localhost") and is_this_machine(socket.gethostname())
    assert not is_this_machine("no-such-host.invalid") and not is_this_machine("192.0.2.1")
    assert not is_this_machine("127.0.0.9"), "an address of the loopback interface is a test, or a tunnel"


@pytest.mark.parametrize("name", ["PYTHONPATH", "PATH", "LD_LIBRARY_PATH"])
def test_a_password_on_a_path_is_refused_without_being_shown(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} holds a URL with a password") as caught:
        early_variables({name: f"/x:{WITH_PASSWORD}"})
    assert "PaSsW0rd" not in str(caught.value)
    assert early_variables({"PYTHON_KEYRING_PASSWORD": "x", "HF_TOKEN": "x", "PYTHONHASHSEED": "0"}) == {
        "PYTHONHASHSEED": "0"
    }


def test_ssh_is_used_unless_it_does_not_work_inside_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = (Host("localhost", 1), Host("b", 1))
    tried: list[str] = []

    def run_on(host: str, *_: object) -> Finished:
        tried.append(host)
        return Finished(255, "", "Permission denied", 0.1)

    monkeypatch.setattr(reach, "run_on", run_on)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert choose_way(None, hosts) == "ssh" and tried == []
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        choose_way("srun", hosts)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert choose_way("ssh", hosts) == "ssh" and choose_way("srun", hosts) == "srun" and tried == []
    assert choose_way(None, hosts) == "srun" and tried == ["b"]
    assert choose_way(None, hosts[:1]) == "ssh", "this machine alone needs neither"
    monkeypatch.setattr(reach, "run_on", lambda *_: Finished(0, "", "", 0.1))
    assert choose_way(None, hosts) == "ssh"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="srun on PATH"):
        choose_way("srun", hosts)


def test_the_first_host_is_known_to_others_by_an_address_that_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of((Host("localhost", 2),)) in ("127.0.0.1", "::1")
    routes = {"here": ("127.0.1.1", "127.0.0.1"), "there": ("10.0.0.2", "10.0.0.1")}
    monkeypatch.setattr(reach, "_route", lambda name: routes[name])
    assert address_of((Host("here", 1), Host("there", 1))) == "10.0.0.1"
    assert address_of((Host("there", 1), Host("here", 1))) == "10.0.0.2"
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid has no address"):
        address_of((Host("no-such-host.invalid", 1),))


def test_the_line_for_ssh_is_one_word_list() -> None:
    line = start_command("no.such.host", "ssh", ("python", "-m", "x y"), Path("/a b"), "run.1", 5.0).words[-1]
    assert shlex.split(line)[:4] == ["cd", "--", "/a b", "&&"] and shlex.split(line)[-3:] == ["python", "-m", "x y"]
