"""Benchmark processes as forks of the server that has imported the frameworks (see `tests.ranks`)."""

import multiprocessing
import os
import subprocess
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import workers
from benchmarks.common.conditions import ROOT
from tests.ranks import Script, end_processes, fork_script

WORKER = ROOT / "benchmarks" / "common" / "worker.py"


class Fork:
    """A fork, with what `benchmarks.common.workers` uses of a `subprocess.Popen`.

    Args:
        process: that was started.
        commands: the end of the pipe that is its standard input.
    """

    def __init__(self, process: BaseProcess, commands: Connection):
        self._process = process
        self.stdin = os.fdopen(os.dup(commands.fileno()), "w")

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        """Exit code, once it has ended."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(WORKER), timeout_s or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        """End it and what it started."""
        end_processes([self._process])


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks fork their processes."""

    def start(self: Any, variables: dict[str, Any]) -> None:
        commands_read, commands = multiprocessing.Pipe(duplex=False)
        replies, replies_written = multiprocessing.Pipe(duplex=False)
        place = {name: str(value) for name, value in variables.items()}
        log, before = self._path / f"{place['RANK']}.log", partial(_enter, place, commands_read, replies_written)
        log.touch()
        words = (str(self._path / "settings.json"),)
        (process,) = fork_script(Script(WORKER, words, Path.cwd(), log, log, before=before), None)
        self._replies.append(os.fdopen(os.dup(replies.fileno())))
        self._processes.append(Fork(process, commands))
        for end in (commands_read, commands, replies, replies_written):
            end.close()

    monkeypatch.setattr(workers.Workers, "_start", start)


def _enter(place: dict[str, str], commands: Connection, replies: Connection) -> None:
    """Called in the fork: its place in the world, its standard input and where its answers leave."""
    os.dup2(commands.fileno(), 0)
    os.environ.update(place | {"STAGDIST_REPLY_FD": str(os.dup(replies.fileno()))})
    commands.close()
    replies.close()
