"""Runs the script of one rank: starts it, logs its output, reports its state to the supervisor, and ends it.

The script starts after the supervisor has answered, so every running script is on record there. It runs as a
child in a separate process group that the kernel kills when the agent dies. The agent ends it when the supervisor
requests it, when the supervisor is gone, or when no message came for the duration of the lease.
Started as `python -m stagdist.cluster.supervision.agent --job FILE` by any launcher. Imports no framework.
"""

import argparse
import contextlib
import ctypes
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagdist.cluster.hosts.leftovers import kill_all, processes_with
from stagdist.cluster.supervision.background_output import DRAIN_S, ScriptOutput
from stagdist.cluster.supervision.messages import AGENT_ERROR, LONGEST_LINE, Job, decode, encode, read_job
from stagdist.errors import ConfigError, TransportError
from stagdist.parallel.world import World, join_launcher
from stagdist.telemetry.pulse import DUMP_SIGNAL, PULSE_FILE, PulseReader, stack_lines

TICK_S = 0.1
REPORT_S = 1.0

OUTBOX_BYTES = 1 << 20

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None]:
    """What a child calls before it becomes another program, so that the kernel kills it when we die."""
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def end_launcher() -> None:
    """Ask the launcher's process on this host, our parent, to end.

    After a network failure nothing else does: Open MPI's daemon waits for a message from its master.
    """
    parent = os.getppid()
    if parent > 1:  # else it has ended already
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(parent, signal.SIGTERM)


def host_name() -> str:
    """Name of this host for messages."""
    return socket.gethostname().partition(".")[0]


class Agent:
    """Runs one rank.

    Args:
        job: what to run.
        world: place of this rank.
    """

    def __init__(self, job: Job, world: World):
        self._job, self._world = job, world
        self._selector = selectors.DefaultSelector()
        self._scratch = Path(tempfile.mkdtemp(prefix="stagdist-agent-"))
        self._pulse_file = self._scratch / "pulse"
        self._pulse = PulseReader(self._pulse_file)
        self._outbox, self._inbox = bytearray(), b""
        self._heard = self._reported = time.monotonic()
        self._reported_step, self._kill_at = -2, None  # type: tuple[int, float | None]
        self._ended_by_us = self._cut_off = False

    def run(self) -> int:
        """Until the script has ended. Returns: its exit code, 128 + signal after a signal.

        Raises:
            TransportError: the supervisor cannot be reached, or refuses this agent.
        """
        try:
            self._socket = self._connect()
            self._introduce()
            try:
                self._start()
            except OSError as error:
                self._report_failure(error)
                raise
            self._take(b"")  # what came with the welcome
            signal.signal(signal.SIGTERM, lambda *_: self._signal(signal.SIGTERM))
            signal.signal(signal.SIGINT, lambda *_: self._signal(signal.SIGINT))
            while self._child.poll() is None:
                self._turn()
            code = self._conclude()
            if self._cut_off:
                end_launcher()
            return code
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _connect(self) -> socket.socket:
        job = self._job
        try:
            connection = socket.create_connection((job.address, job.port), timeout=job.lease_s)
        except OSError as error:
            raise TransportError(
                f"rank {self._world.rank} on {host_name()} cannot reach the supervisor at {job.address}:{job.port}: "
                f"{error}; give launch/run.py an address that all hosts can reach with --address"
            ) from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _introduce(self) -> None:
        """Say who we are and wait for the welcome: a late agent of an ended attempt gets none, and starts nothing.

        Raises:
            TransportError: no welcome within the lease.
        """
        job, rank = self._job, self._world.rank
        self._send("hello", token=job.token, attempt=job.attempt, host=host_name(), pid=os.getpid())
        try:
            self._socket.sendall(bytes(self._outbox))
            data = self._socket.recv(LONGEST_LINE)
        except TimeoutError:
            end_launcher()
            raise TransportError(f"no word from the supervisor for {job.lease_s:.0f} s: rank {rank} ends") from None
        except OSError:
            data = b""
        if not data:
            raise TransportError(f"the supervisor ended, or does not expect rank {rank} of attempt {job.attempt} now")
        self._outbox.clear()
        self._inbox = data
        self._socket.setblocking(False)
        self._selector.register(self._socket, selectors.EVENT_READ, self._listen)

    def _start(self) -> None:
        job, rank = self._job, self._world.rank
        log = (Path(job.logs) / f"rank_{rank:05d}.{host_name()}.log").open("ab", buffering=0)
        environment = os.environ | dict(job.environment) | {PULSE_FILE: str(self._pulse_file), "PYTHONUNBUFFERED": "1"}
        self._child = subprocess.Popen(
            [sys.executable, *job.command],
            cwd=job.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        assert self._child.stdout is not None
        self._output = ScriptOutput(self._child.stdout, log)
        self._selector.register(self._child.stdout, selectors.EVENT_READ, self._collect)
        self._selector.register(os.pidfd_open(self._child.pid), selectors.EVENT_READ, lambda: None)

    def _turn(self) -> None:
        for key, _ in self._selector.select(TICK_S):
            key.data()
        now = time.monotonic()
        self._report(now)
        self._flush()
        if now - self._heard > self._job.lease_s and self._kill_at is None:
            self._say(f"no word from the supervisor for {self._job.lease_s:.0f} s: this rank ends")
            self._cut_off = True
            self._end()
        if self._kill_at is not None and now > self._kill_at:
            self._end()

    def _report(self, now: float) -> None:
        sign = self._pulse.read()
        if sign.step == self._reported_step and now - self._reported < REPORT_S:
            return
        self._reported_step, self._reported = sign.step, now
        self._send("state", **{**vars(sign), "phase": int(sign.phase)}, process=self._process())

    def _process(self) -> str:
        """State letter of the script's process: T is stopped, D stuck in the kernel, R running, S waiting."""
        try:
            return Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "?"

    def _collect(self) -> None:
        lines = self._output.read()
        if lines is None:
            self._selector.unregister(self._output.stream)
        elif self._world.rank == 0 and len(self._outbox) < OUTBOX_BYTES:
            for line in lines:
                self._send("line", text=line)

    def _listen(self) -> None:
        try:
            data = self._socket.recv(LONGEST_LINE)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(self._socket)
            self._heard = float("inf")
            self._say("the supervisor is gone: this rank saves and ends")
            self._stop()
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        self._heard = time.monotonic()
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            self._obey(decode(line)["kind"])

    def _obey(self, kind: str) -> None:
        actions: dict[str, Callable[[], None]] = {
            "welcome": lambda: None,
            "ping": lambda: None,
            "stop": self._stop,
            "end": self._end,
            "dump": self._dump,
        }
        actions[kind]()

    def _stop(self) -> None:
        """Ask the script for its orderly end, also one that was stopped; it has `stop_s` seconds."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._job.stop_s
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)

    def _end(self) -> None:
        self._ended_by_us = True
        self._kill_at = float("inf")
        self._kill_group()

    def _dump(self) -> None:
        """Python stacks of the script; a stopped process is resumed for it."""
        before = len(self._output.tail)
        self._output.tail.clear()
        if self._pulse.read().count:  # else nothing handles the signal yet, and it would kill
            self._signal(DUMP_SIGNAL)
            self._signal(signal.SIGCONT)
            wait_s = 1.0
            deadline = time.monotonic() + DRAIN_S  # another thread of the script may write without end
            while time.monotonic() < deadline and select.select([self._output.stream], [], [], wait_s)[0]:
                if self._output.read() is None:
                    break
                wait_s = 0.1  # the stacks come in one go
            self._signal(signal.SIGSTOP)
        self._send("stack", lines=stack_lines(self._output.tail) or [f"no stack; {before} lines of output before"])

    def _signal(self, number: int) -> None:
        """Signal the script alone. Its child processes, such as data loaders, must live until it has shut down."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def _conclude(self) -> int:
        """Kill the processes that the script left and report its exit."""
        code = self._child.returncode
        self._kill_group()
        # What the script started in sessions of their own has its variables all the same.
        kill_all(lambda: processes_with(PULSE_FILE, lambda value: value == str(self._pulse_file)), DRAIN_S)
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline and (lines := self._output.read()) is not None:
            if not lines:
                select.select([self._output.stream], [], [], TICK_S)
        self._output.close()
        self._report(float("inf"))
        self._send("exit", code=code, tail=list(self._output.tail), ended=self._ended_by_us)
        self._farewell()
        return code if code >= 0 else 128 - code

    def _report_failure(self, error: OSError) -> None:
        """Report to the supervisor why the script could not be started."""
        says = f"error: {error.filename or self._job.folder}: {error.strerror or error}"
        self._send("exit", code=1, tail=[says], ended=False)
        self._farewell()

    def _farewell(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.settimeout(DRAIN_S)
            self._socket.sendall(bytes(self._outbox))
            # Closing with an unread ping would reset the connection, and the last messages could be lost.
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(LONGEST_LINE):
                pass

    def _send(self, kind: str, **content: Any) -> None:
        self._outbox += encode({"kind": kind, "rank": self._world.rank, **content})

    def _flush(self) -> None:
        if self._heard == float("inf"):
            self._outbox.clear()
            return
        with contextlib.suppress(OSError):  # a broken connection shows when reading
            del self._outbox[: self._socket.send(self._outbox)]

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"agent of rank {self._world.rank} on {host_name()}: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Exit code: the script's; 2 when it could not be started."""
    parser = argparse.ArgumentParser(prog="agent", description=__doc__)
    parser.add_argument("--job", required=True, metavar="FILE", help="written by the supervisor")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        return Agent(read_job(arguments.job), join_launcher()).run()
    except (ConfigError, TransportError, OSError) as error:
        print(f"{AGENT_ERROR}{error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
