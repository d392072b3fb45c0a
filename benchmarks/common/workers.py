"""Starts the processes of a benchmark and sends them commands."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.conditions import ROOT
from stagdist.errors import TrainingError

END_S = 20.0
LOG_CHARACTERS = 4000

Answer = dict[str, Any]


class Workers:
    """One world of processes, idle between commands. Use it as a context manager.

    Args:
        world_size: number of processes.
        settings: given to every process; `site` names the class to run as `module:Class`, `config` the run.
        threads: threads of each process.

    Attributes:
        started: what each process reported at its start, by rank.

    Raises:
        TrainingError: a process ended; with the end of its output.
    """

    def __init__(self, world_size: int, settings: Answer, *, threads: int = 1):
        self._folder = tempfile.TemporaryDirectory(prefix="stagdist-bench-")
        self._path = Path(self._folder.name)
        (self._path / "settings.json").write_text(json.dumps(settings))
        self._processes: list[subprocess.Popen[str]] = []
        self._replies: list[Any] = []
        world = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        try:
            for rank in range(world_size):
                self._start(world | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": threads})
            self.started: list[Answer] = [self._receive(rank) for rank in range(world_size)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def together(self, name: str) -> list[Answer]:
        """Run a contestant on all ranks at the same time; answers by rank."""
        return self._ask("together", name, range(len(self._processes)))

    def apart(self, name: str) -> list[Answer]:
        """Run it on one rank after the other while the rest are idle; answers by rank."""
        return [self._ask("apart", name, [rank])[0] for rank in range(len(self._processes))]

    def close(self) -> None:
        """End the processes; kill those that do not end."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for replies in self._replies:
            replies.close()
        self._folder.cleanup()

    def _ask(self, how: str, name: str, ranks: Iterable[int]) -> list[Answer]:
        for rank in ranks:
            try:
                print(how, name, file=self._processes[rank].stdin, flush=True)
            except BrokenPipeError:
                self._fail(rank)
        return [self._receive(rank) for rank in ranks]

    def _receive(self, rank: int) -> Answer:
        line = self._replies[rank].readline()
        if not line:
            self._fail(rank)
        answer: Answer = json.loads(line)
        return answer

    def _fail(self, rank: int) -> None:
        process = self._processes[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        output = (self._path / f"{rank}.log").read_text(errors="replace")[-LOG_CHARACTERS:]
        raise TrainingError(
            f"rank {rank} of {len(self._processes)} of the benchmark ended with code {process.poll()}; "
            f"the end of its output:\n{output}"
        )

    def _start(self, variables: dict[str, Any]) -> None:
        reading, writing = os.pipe()
        self._replies.append(os.fdopen(reading))
        variables |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "STAGDIST_REPLY_FD": writing,
        }
        command = [sys.executable, "-m", "benchmarks.common.worker", str(self._path / "settings.json")]
        with (self._path / f"{variables['RANK']}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=os.environ | {name: str(value) for name, value in variables.items()}, text=True,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[writing],
            )  # fmt: skip
        os.close(writing)
        self._processes.append(process)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on, below those the kernel gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
