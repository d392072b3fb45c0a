"""Processes inside the hosts of a lab: what runs there, and handles on what was started there."""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from tests.lab.wiring import ProcessId, stat_fields

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


@dataclasses.dataclass(frozen=True)
class HostProcess:
    """A process of a host.

    Attributes:
        host: where it runs.
        pid: number inside the host.
        command: its words.
        environment: variables it was started with.
        identity: the same process seen from outside the host.
        parent_outside: number of the parent, seen from outside.
    """

    host: str
    pid: int
    command: tuple[str, ...]
    environment: dict[str, str]
    identity: ProcessId
    parent_outside: int

    @property
    def rank(self) -> int | None:
        """Global rank, if a launcher gave it one."""
        return next((int(self.environment[name]) for name in RANK_VARIABLES if name in self.environment), None)

    @property
    def state(self) -> str:
        """R running, S sleeping, D waiting for a disk, T stopped."""
        return stat_fields(self.identity.pid)[0]

    def signal(self, number: int) -> None:
        """Send a signal.

        Raises:
            ProcessLookupError: it has ended.
        """
        if not self.identity.alive():
            raise ProcessLookupError(f"process {self.pid} of {self.host} has ended: {' '.join(self.command)[:200]}")
        os.kill(self.identity.pid, number)


def processes_of(host: str, init: int) -> list[HostProcess]:
    """What runs in the pid namespace of process `init` (seen from outside), the ssh servers left out."""
    space = os.readlink(f"/proc/{init}/ns/pid")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "ns" / "pid") == space:
                    found.append(_read(host, entry))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it has just ended, or belongs to somebody into whom not even root may look
    return sorted((one for one in found if one and not _is_ssh_server(one)), key=lambda one: one.pid)


def _read(host: str, entry: Path) -> HostProcess | None:
    identity = ProcessId.of(int(entry.name))
    command = tuple(entry.joinpath("cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0"))
    if not identity.alive() or command == ("",):
        return None
    variables = entry.joinpath("environ").read_bytes().decode(errors="replace").split("\0")
    environment = dict(one.split("=", 1) for one in variables if "=" in one)
    numbers = next(line for line in entry.joinpath("status").read_text().splitlines() if line.startswith("NSpid:"))
    parent = int(stat_fields(identity.pid)[1])
    return HostProcess(host, int(numbers.split()[-1]), command, environment, identity, parent)


def _is_ssh_server(process: HostProcess) -> bool:
    return process.pid == 1 or process.command[0].startswith(("sshd:", "/usr/sbin/sshd"))


def ranks_among(processes: Iterable[HostProcess]) -> dict[int, HostProcess]:
    """The processes that a launcher started as ranks; what they started in turn carries their variables too."""
    with_rank = {one.identity.pid: one for one in processes if one.rank is not None}
    ranks = {}
    for one in with_rank.values():
        parent = with_rank.get(one.parent_outside)
        if one.rank is not None and (parent is None or parent.rank != one.rank):
            ranks[one.rank] = one
    return dict(sorted(ranks.items()))


class Call:
    """A command that runs in a host, logged in to through ssh. Its output grows in `output`."""

    def __init__(self, client: "subprocess.Popen[bytes]", host: str, output: Path, pid_file: Path, what: str):
        self.client, self.host, self.output, self.pid_file, self.what = client, host, output, pid_file, what

    @property
    def pid(self) -> int:
        """Number inside the host of the process that was started; waits until it is known."""
        deadline = time.monotonic() + 20
        while not (text := self.pid_file.read_text() if self.pid_file.exists() else "").endswith("\n"):
            assert self.client.poll() is None or self.pid_file.exists(), f"{self.what} did not start:\n{self.text()}"
            assert time.monotonic() < deadline, f"{self.what} did not start in 20 s:\n{self.text()}"
            time.sleep(0.01)
        return int(text)

    def poll(self) -> int | None:
        """Exit code, None while it runs; 255 when the connection broke."""
        return self.client.poll()

    def wait(self, timeout_s: float = 180) -> int:
        """Exit code.

        Raises:
            AssertionError: it still runs; with its output. The lab ends it at the latest when it is closed.
        """
        try:
            return self.client.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.what} still runs after {timeout_s:g} s:\n{self.text()}") from None

    def text(self) -> str:
        """Everything it printed so far."""
        return self.output.read_text(errors="replace")

    def leave(self) -> None:
        """End the ssh client only: what it started goes on, as after a lost connection."""
        self.client.send_signal(signal.SIGKILL)
        self.client.wait()
