"""Commands on hosts: quoted whatever they hold, ended when their time is up."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from stagdist.cluster.hosts.remote import Finished, on_all, remote_command, run_here, run_on, ssh_words
from stagdist.errors import ConfigError


@pytest.fixture
def pretended_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `ssh` that hands its last word to a shell, as a host does, and notes its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ssh"
    script.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\nexec /bin/sh -c "${{@: -1}}"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_words_folder_and_values_with_shell_characters_arrive_as_they_are(pretended_ssh: Path) -> None:
    folder = pretended_ssh / "a folder; touch owned"
    folder.mkdir()
    word = "$(touch owned) `touch owned` 'x' \"y\" ; touch owned"
    done = run_on("node1", ["sh", "-c", 'echo "$1|$V|$PWD"', "x", word], 10, folder=folder, environment={"V": word})
    assert (done.ok, done.stdout) == (True, f"{word}|{word}|{folder}\n")
    assert not list(pretended_ssh.rglob("owned"))


def test_ssh_asks_nothing_and_takes_the_host_for_nothing_else(pretended_ssh: Path) -> None:
    run_on("node1", ["true"], 10)
    arguments = (pretended_ssh / "arguments").read_text().splitlines()
    assert {"BatchMode=yes", "ConnectTimeout=5"} <= set(arguments)
    assert arguments[-3:-1] == ["--", "node1"]


@pytest.mark.parametrize("name", ["-oProxyCommand=touch x", "a;b", "$(id)", "a b", ""])
def test_a_name_that_is_no_host_reaches_no_ssh(name: str) -> None:
    with pytest.raises(ConfigError, match="refused"):
        ssh_words(name, "true")


def test_exit_code_and_complaint_come_back(pretended_ssh: Path) -> None:
    done = run_on("node1", ["sh", "-c", "echo one >&2; echo two >&2; exit 7"], 10)
    assert (done.code, done.ok, done.reason) == (7, False, "two")
    assert Finished(3, "", "", 0.1).reason == "exit code 3"


def test_the_host_ends_a_command_whose_time_is_up() -> None:
    started = time.monotonic()
    done = subprocess.run(["sh", "-c", remote_command(["sleep", "60"], 0.3)])
    assert done.returncode == 124
    assert time.monotonic() - started < 10


def test_a_command_that_hangs_here_is_killed_with_what_it_started(tmp_path: Path) -> None:
    done = run_here(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], 0.5)
    assert (done.code, done.ok) == (None, False)
    assert "no end within" in done.reason
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    deadline = time.monotonic() + 5  # the signal is sent, the kernel needs a moment
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_standard_input_reaches_the_command(pretended_ssh: Path) -> None:
    assert run_on("node1", ["cat"], 10, stdin="some text").stdout == "some text"


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="no-such-program cannot be started"):
        run_here(["no-such-program"], 1)


def test_all_hosts_are_asked_at_the_same_time_and_keep_their_order() -> None:
    all_at_once = threading.Barrier(8, timeout=30)

    def ask(host: str) -> str:
        all_at_once.wait()  # breaks unless eight are here at the same time
        return host.upper()

    results = on_all([f"n{index}" for index in range(8)], ask)
    assert results == {f"n{index}": f"N{index}" for index in range(8)}


def test_what_goes_wrong_for_one_host_is_raised_and_few_are_asked_at_once() -> None:
    running: list[str] = []
    most = 0

    def count(host: str) -> None:
        nonlocal most
        running.append(host)
        most = max(most, len(running))
        time.sleep(0.02)
        running.remove(host)
        if host == "n3":
            raise ConfigError("n3 is wrong")

    with pytest.raises(ConfigError, match="n3"):
        on_all([f"n{index}" for index in range(6)], count, at_once=2)
    assert most == 2
