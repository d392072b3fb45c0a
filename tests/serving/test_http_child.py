"""Rank 0 finds, starts and ends the HTTP process, and is not held up by one that does not answer."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, SERVICE_LOG
from stagdist.errors import ConfigError
from stagdist.serving import http_child
from stagdist.serving.http_child import HttpProcess, HttpProcessError
from stagdist.serving.settings import KEYS_VARIABLE, ServerSettings
from stagdist.telemetry.pulse import PULSE_FILE
from tests.ranks import free_port

STATE = {"kind": "state", "state": "loading", "reason": "x" * 100}


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in that is there in a moment; nothing of it is left."""
    monkeypatch.setattr(http_child, "MODULE", "tests.serving.scripted_http")
    monkeypatch.setattr(http_child, "WELCOME_S", 1.0)
    monkeypatch.setattr(http_child, "FAREWELL_S", 1.0)
    monkeypatch.setattr(http_child, "SEND_S", 1.0)
    before = set(psutil.Process().children())
    yield
    for process in set(psutil.Process().children()) - before:
        process.kill()
        process.wait()


def settings(folder: Path, **changes: object) -> ServerSettings:
    """Of a server at a free port."""
    given = {"port": free_port(), "engine_socket": str(folder / "s"), **changes}
    return ServerSettings(**given)  # type: ignore[arg-type]


def running() -> psutil.Process:
    """The one stand-in that runs; other tests may have children too."""
    alive = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    (process,) = [one for one in alive if http_child.MODULE in one.cmdline()]
    return process


def connected(given: ServerSettings) -> tuple[HttpProcess, psutil.Process]:
    """A process and what it is for the system."""
    http = HttpProcess(given)
    http.connect()
    return http, running()


def ended(process: psutil.Process) -> bool:
    """Whether it ends in a moment."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(5)
    return not process.is_running()


def test_it_is_in_a_session_of_its_own_without_the_variables_of_a_rank_and_ends_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"RANK": "0", PULSE_FILE: "p", KEYS_VARIABLE: "secret", JOB_VARIABLE: "run.7"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with HttpProcess(settings(tmp_path, api_keys=("secret",))) as http:
        http.connect()
        http.send(STATE)  # type: ignore[arg-type]
        process = running()
        variables = process.environ()
        assert os.getsid(process.pid) == process.pid
        assert not {"RANK", PULSE_FILE, KEYS_VARIABLE} & variables.keys() and variables[JOB_VARIABLE] == "run.service"
        assert "secret" not in " ".join([*process.cmdline(), *variables.values()])
    assert ended(process)


def test_what_it_cannot_use_is_the_error_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPTED_HTTP", "refuse")
    with pytest.raises(ConfigError, match="^the port is in use$"), HttpProcess(settings(tmp_path)) as http:
        http.connect()


def test_an_error_without_a_supervisor_ends_it_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError), HttpProcess(settings(tmp_path)) as http:
        http.connect()
        process = running()
        raise ValueError
    assert ended(process)
    with pytest.raises(ValueError), HttpProcess(settings(tmp_path)) as http:
        process = running()
        raise ValueError  # before it is connected
    assert ended(process)


def test_under_a_supervisor_the_next_rank_0_finds_it_and_one_with_other_settings_replaces_it(tmp_path: Path) -> None:
    port = free_port()
    given = settings(tmp_path, port=port, supervised=True)
    with pytest.raises(ValueError), HttpProcess(given) as http:
        http.connect()
        process = running()
        raise ValueError
    with pytest.raises(ValueError):
        again, same = connected(given)
        assert same == process
        with again:
            raise ValueError
    other, new = connected(settings(tmp_path, port=port, supervised=True, names=("other",)))
    assert new != process and ended(process)
    with other:
        pass
    assert ended(new)


def test_one_with_other_settings_has_left_the_port_before_the_next_one_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPTED_HTTP", "lingers")
    given = settings(tmp_path, supervised=True)
    with pytest.raises(ValueError):
        old, process = connected(given)
        with old:
            raise ValueError
    with HttpProcess(settings(tmp_path, supervised=True, port=given.port, names=("other",))) as http:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        http.connect()


def test_one_that_does_not_answer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path, supervised=True)
    monkeypatch.setenv("SCRIPTED_HTTP", "silent")
    silent = HttpProcess(given)
    with pytest.raises(HttpProcessError, match="did not answer within 1 s"):
        silent.connect()
    process = running()
    monkeypatch.delenv("SCRIPTED_HTTP")
    with HttpProcess(given) as http:
        http.connect()
        assert ended(process)


@pytest.mark.parametrize("way", ["deaf", "stopped"])
def test_one_that_takes_no_messages_holds_rank_0_up_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("SCRIPTED_HTTP", "deaf" if way == "deaf" else "")
    http, process = connected(settings(tmp_path))
    if way == "stopped":
        process.send_signal(signal.SIGSTOP)
    begin, slowest = time.monotonic(), 0.0
    with pytest.raises(HttpProcessError, match="took no message for 1 s and was ended"):
        while time.monotonic() < begin + 20:
            before = time.monotonic()
            try:
                http.send(STATE)  # type: ignore[arg-type]
            finally:
                slowest = max(slowest, time.monotonic() - before)
    assert 0.9 < slowest < 3 and ended(process)


def test_a_killed_one_is_noticed_by_reading_and_by_writing(tmp_path: Path) -> None:
    http, process = connected(settings(tmp_path))
    process.kill()
    assert http.receive() is None
    with pytest.raises(HttpProcessError, match="has ended"):
        http.send(STATE)  # type: ignore[arg-type]


def test_under_a_supervisor_it_writes_into_the_log_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVICE_LOG, str(tmp_path / "http.log"))
    monkeypatch.setattr(http_child, "MODULE", "no.such.module")
    with (
        pytest.raises(HttpProcessError, match="ended with code 1 while it started"),
        HttpProcess(settings(tmp_path)) as http,
    ):
        http.connect()
    assert "No module named" in (tmp_path / "http.log").read_text()
