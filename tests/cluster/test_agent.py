"""An agent starts nothing without a job, and ends its ranks when no message or no pipe comes from the supervisor."""

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagdist.cluster.supervision.host_agents import AGENT
from stagdist.cluster.supervision.messages import Job, decode, encode, read_job

SCRIPT = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text('x'); time.sleep(60)"


def job(place: Path, **values: Any) -> Job:
    """Two ranks that write a file of their number and sleep."""
    (place / "script.py").write_text(SCRIPT)
    usual: dict[str, Any] = {
        "slots": 2,
        "first_rank": 4,
        "command": (str(place / "script.py"), str(place)),
        "logs": str(place),
    }
    usual |= {"needs": str(place), "lease_s": 30.0, "folder": str(place)}
    return Job(f"test{os.getpid()}", **{**usual, **values})


class Talk:
    """An agent and what it says."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(AGENT, stdin=pipe, stdout=pipe, stderr=pipe)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdout.fileno(), False)
        self._rest = b""
        self.messages: list[dict[str, Any]] = []

    def send(self, line: bytes) -> None:
        """Write to its standard input."""
        self.stdin.write(line)
        self.stdin.flush()

    def until(self, condition: Callable[[], bool], ping: bool = True) -> None:
        """Read until something holds."""
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, self.messages
            if ping:
                self.send(encode("ping"))
            if select.select([self.stdout], [], [], 0.1)[0]:
                *lines, self._rest = (self._rest + (self.stdout.read() or b"")).split(b"\n")
                self.messages += [decode(line) for line in lines]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Messages of one kind."""
        return [message for message in self.messages if message["kind"] == kind]

    def end(self) -> tuple[int, str]:
        """Exit code and complaints."""
        assert self.process.stderr is not None
        complaints = self.process.stderr.read().decode()
        return self.process.wait(30), complaints


@pytest.fixture
def talk() -> Iterator[Talk]:
    one = Talk()
    yield one
    one.process.kill()
    one.process.wait()


def both_run(folder: Path) -> bool:
    return (folder / "4").exists() and (folder / "5").exists()


def test_ranks_start_are_ended_on_request_and_reported(talk: Talk, tmp_path: Path) -> None:
    talk.send(job(tmp_path).encoded())
    talk.until(lambda: both_run(tmp_path))
    talk.send(encode("end"))
    talk.until(lambda: len(talk.of("exit")) == 2)
    (hello,) = talk.of("hello")
    assert (hello["ranks"], hello["ended"], hello["problem"]) == ([4, 5], 0, "")
    assert {(one["rank"], one["code"], one["ended"]) for one in talk.of("exit")} == {(4, -9, True), (5, -9, True)}
    assert talk.end() == (0, "")


def test_ranks_behind_a_cut_link_end_with_their_lease(talk: Talk, tmp_path: Path) -> None:
    talk.send(job(tmp_path, lease_s=2.0).encoded())
    talk.until(lambda: both_run(tmp_path))
    talk.until(lambda: len(talk.of("exit")) == 2, ping=False)
    code, complaints = talk.end()
    assert code == 0 and "no word from the supervisor for 2 s" in complaints


def test_ranks_of_a_supervisor_that_is_gone_are_asked_to_end(talk: Talk, tmp_path: Path) -> None:
    talk.send(job(tmp_path).encoded())
    talk.until(lambda: both_run(tmp_path))
    talk.stdin.close()
    code, complaints = talk.end()
    assert code == 0 and "the supervisor is gone" in complaints


def test_an_agent_without_a_job_starts_nothing(talk: Talk, tmp_path: Path) -> None:
    talk.stdin.close()
    code, complaints = talk.end()
    assert code == 1 and "no job came" in complaints


def test_a_host_that_does_not_see_what_it_needs_starts_nothing(talk: Talk, tmp_path: Path) -> None:
    talk.send(job(tmp_path, needs=str(tmp_path / "away")).encoded())
    talk.until(lambda: bool(talk.of("hello")))
    assert talk.of("hello")[0]["problem"].startswith(f"{tmp_path / 'away'} is not there")
    assert talk.end()[0] == 0 and not both_run(tmp_path)


def test_a_script_that_cannot_be_started_is_reported(talk: Talk, tmp_path: Path) -> None:
    talk.send(job(tmp_path, folder=str(tmp_path / "away")).encoded())
    talk.until(lambda: len(talk.of("exit")) == 2)
    assert talk.of("exit")[0]["tail"] == [f"error: {tmp_path / 'away'}: No such file or directory"]
    assert talk.end()[0] == 0


def test_a_job_arrives_as_it_was() -> None:
    sent = Job("run", "/needed", 3.0, 2, 4, ("a.py", "b c"), "/work", {"X": "ü\n"}, "/logs", 5.0)
    assert read_job(sent.encoded()) == sent
    with pytest.raises(ValueError, match="no job"):
        read_job(encode("ping"))
