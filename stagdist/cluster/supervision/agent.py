"""Runs the ranks of one host for the supervisor: starts them, logs their output, reports their state, and ends them.

Started as `python -m stagdist.cluster.supervision.agent`, with pipes that lead to the supervisor. The first line of
standard input is the `Job`; commands follow, and reports go to standard output. The agent ends the ranks when the
supervisor requests it, when the pipe is closed, or when no message came for the duration of the lease. Imports no
framework.
"""

import contextlib
import os
import select
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, end_earlier
from stagdist.cluster.supervision.background_output import DRAIN_S, ScriptOutput
from stagdist.cluster.supervision.messages import LONGEST_LINE, NOT_SHARED, Job, decode, encode, read_job
from stagdist.cluster.supervision.script import Script

TICK_S = 0.1
JOB_S = 30.0
"""Seconds that an agent waits for its job."""

VISIBLE_S = 3.0
"""Seconds until a network file system shows what another host has created."""

OUTBOX_BYTES = 1 << 20
STDIN, STDOUT = 0, 1
GONE = float("inf")


def host_name() -> str:
    """Name of this host for messages."""
    return socket.gethostname().partition(".")[0]


class Agent:
    """Runs the ranks of a host.

    Args:
        job: what to run.
        received: what has come after the job.
    """

    def __init__(self, job: Job, received: bytes):
        self._job, self._inbox = job, received
        self._outbox = bytearray()
        self._scripts: dict[int, Script] = {}
        self._outputs: list[ScriptOutput] = []
        self._selector = selectors.DefaultSelector()
        self._heard, self._kill_at = time.monotonic(), GONE

    def run(self) -> None:
        """Clear the host, then run the ranks until all have ended."""
        job = self._job
        ended, left = end_earlier(job.run, os.environ.get(JOB_VARIABLE, ""), keep_service=job.keep_service)
        problem = f"{left} processes of an earlier start cannot be ended" if left else missing(Path(job.needs))
        ranks = [] if problem else list(job.ranks)
        self._send("hello", host=host_name(), ranks=ranks, ended=ended, problem=problem)
        self._flush()
        scratch = Path(tempfile.mkdtemp(prefix="stagdist-agent-"))
        try:
            if ranks:
                self._start(scratch)
            self._take(b"")
            while self._scripts:
                self._turn()
            self._take_leave()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _start(self, scratch: Path) -> None:
        job = self._job
        for local_rank, rank in enumerate(job.ranks):
            try:
                self._scripts[rank] = Script(job, local_rank, host_name(), scratch)
            except OSError as error:
                says = f"error: {error.filename or job.folder}: {error.strerror or error}"
                self._send("exit", rank=rank, code=1, tail=[says], ended=False)
        for script in self._scripts.values():
            self._outputs.append(script.listen())
            self._selector.register(script.output.stream, selectors.EVENT_READ, lambda one=script: self._collect(one))
        os.set_blocking(STDOUT, False)
        self._selector.register(STDIN, selectors.EVENT_READ, self._listen)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())

    def _turn(self) -> None:
        for key, _ in self._selector.select(TICK_S):
            key.data()
        now = time.monotonic()
        for script in list(self._scripts.values()):
            if (state := script.state(now)) is not None:
                self._send("state", rank=script.rank, **state)
            if (last := script.exit(now)) is not None:
                self._send("exit", rank=script.rank, **last)
                del self._scripts[script.rank]
        self._flush()
        if now - self._heard > self._job.lease_s and self._kill_at == GONE:
            say(f"no word from the supervisor for {self._job.lease_s:.0f} s: its ranks end")
            self._end()
        if now > self._kill_at:
            self._end()

    def _collect(self, script: Script) -> None:
        lines = script.output.read()
        if script.output.ended:
            self._selector.unregister(script.output.stream)
        if script.rank == 0 and len(self._outbox) < OUTBOX_BYTES:
            for line in lines:
                self._send("line", rank=0, text=line)

    def _listen(self) -> None:
        data = os.read(STDIN, LONGEST_LINE)
        if not data:
            self._selector.unregister(STDIN)
            self._heard = GONE
            say("the supervisor is gone: its ranks save and end")
            self._stop()
            return
        self._heard = time.monotonic()
        self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for message in map(decode, lines):
            match message["kind"]:
                case "stop":
                    self._stop()
                case "end":
                    self._end()
                case "dump" if message["rank"] in self._scripts:
                    self._send("stack", rank=message["rank"], lines=self._scripts[message["rank"]].stack())

    def _stop(self) -> None:
        """Ask the scripts to shut down cleanly; they have `stop_s` seconds."""
        if self._kill_at == GONE:
            self._kill_at = time.monotonic() + self._job.stop_s
            for script in self._scripts.values():
                script.stop()

    def _end(self) -> None:
        self._kill_at = -GONE
        for script in self._scripts.values():
            script.end()

    def _send(self, kind: str, **content: Any) -> None:
        self._outbox += encode(kind, **content)

    def _flush(self) -> None:
        if self._heard == GONE:
            self._outbox.clear()
            return
        with contextlib.suppress(OSError):  # a broken connection shows when reading
            del self._outbox[: os.write(STDOUT, self._outbox)]

    def _take_leave(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        self._flush()
        while self._outbox and time.monotonic() < deadline:
            select.select([], [STDOUT], [], TICK_S)
            self._flush()
        for output in self._outputs:
            output.close()


def missing(path: Path) -> str:
    """Why a path that the host needs cannot be seen; empty where it can. A new file may take a moment to appear."""
    deadline = time.monotonic() + VISIBLE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return f"{path} {NOT_SHARED}"
        time.sleep(TICK_S)
    return ""


def receive_job() -> tuple[Job, bytes] | None:
    """The job, and what has come after it; None if the supervisor ended or sent nothing within `JOB_S`."""
    data, deadline = b"", time.monotonic() + JOB_S
    while b"\n" not in data:
        if not select.select([STDIN], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        if not (piece := os.read(STDIN, LONGEST_LINE)):
            return None
        data += piece
    line, _, rest = data.partition(b"\n")
    return read_job(line), rest


def say(text: str) -> None:
    """Write to standard error, which may be closed."""
    with contextlib.suppress(OSError):
        print(f"agent on {host_name()}: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Exit code: 0, or 1 without a job."""
    if (received := receive_job()) is None:
        say(f"no job came within {JOB_S:.0f} s, or the supervisor ended")
        return 1
    Agent(*received).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
