"""The process of one rank on its host: started, read, signaled, and ended with everything that it has started."""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagdist.cluster.hosts.leftovers import SERVICE_LOG, kill_all, kill_group
from stagdist.cluster.supervision.background_output import DRAIN_S, ScriptOutput
from stagdist.cluster.supervision.messages import Job
from stagdist.telemetry.pulse import DUMP_SIGNAL, PULSE_FILE, PulseReader, stack_lines

REPORT_S = 1.0

_PR_SET_PDEATHSIG = 1


class Script:
    """The script of one rank. The kernel kills it when this process dies.

    Args:
        job: what to run.
        local_rank: rank on this host.
        host: name of this host, for the log file.
        scratch: folder of the agent.

    Attributes:
        rank: global rank.
        process: Python runs the script in it.

    Raises:
        OSError: it cannot be started, or its log file cannot be written.
    """

    def __init__(self, job: Job, local_rank: int, host: str, scratch: Path):
        self.rank = job.first_rank + local_rank
        self._pulse_file = scratch / f"pulse_{self.rank}"
        self._pulse = PulseReader(self._pulse_file)
        self._log = (Path(job.logs) / f"rank_{self.rank:05d}.{host}.log").open("ab", buffering=0)
        own = {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(local_rank),
            PULSE_FILE: str(self._pulse_file),
            SERVICE_LOG: str(Path(job.logs).parent / f"http.{host}.log"),
        }
        self.process = subprocess.Popen(
            [sys.executable, *job.command],
            cwd=job.folder,
            env=os.environ | dict(job.environment) | own | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        self._reported_step, self._reported = -2, 0.0
        self._ended_at: float | None = None
        self._ended_by_us = False

    def listen(self) -> ScriptOutput:
        """Begin to read the output. It starts a thread, so it follows the start of every script of this process."""
        assert self.process.stdout is not None
        self.output = ScriptOutput(self.process.stdout, self._log)
        return self.output

    def state(self, now: float) -> dict[str, Any] | None:
        """Step, phase and heartbeat for the supervisor; None while there is nothing new."""
        sign = self._pulse.read()
        if sign.step == self._reported_step and now - self._reported < REPORT_S:
            return None
        self._reported_step, self._reported = sign.step, now
        return {**vars(sign), "phase": int(sign.phase), "process": self._state_letter()}

    def _state_letter(self) -> str:
        """T is stopped, D stuck in the kernel, R running, S waiting."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "?"

    def stop(self) -> None:
        """Ask for an orderly end, also if the script is stopped."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill the script and its process group."""
        self._ended_by_us = True
        kill_group(self.process.pid)

    def stack(self) -> list[str]:
        """Python stacks of the script. A stopped process is resumed for it."""
        before = len(self.output.tail)
        self.output.tail.clear()
        if self._pulse.read().count:  # else nothing handles the signal yet, and it would kill
            self.signal(DUMP_SIGNAL)
            self.signal(signal.SIGCONT)
            wait_s = 1.0
            deadline = time.monotonic() + DRAIN_S  # another thread of the script may write without end
            while time.monotonic() < deadline and select.select([self.output.stream], [], [], wait_s)[0]:
                self.output.read()
                if self.output.ended:
                    break
                wait_s = 0.1  # the stacks come in one go
            self.signal(signal.SIGSTOP)
        return stack_lines(self.output.tail) or [f"no stack; {before} lines of output before"]

    def signal(self, number: int) -> None:
        """Signal the script alone. Its child processes, such as data loaders, must live until it has shut down."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def exit(self, now: float) -> dict[str, Any] | None:
        """How it ended, once it and what it started have ended and the output was read; None before."""
        if self.process.poll() is None:
            return None
        if self._ended_at is None:
            self._ended_at = now
            kill_group(self.process.pid)
            # What the script started in sessions of their own has its variables all the same.
            kill_all(PULSE_FILE, lambda value: value == str(self._pulse_file), DRAIN_S)
        if not self.output.ended and now < self._ended_at + DRAIN_S:
            return None
        code = self.process.returncode
        return {"code": code, "tail": list(self.output.tail), "ended": self._ended_by_us}


def _die_with_parent() -> Callable[[], None]:
    """What a child calls before it becomes another program, so that the kernel kills it when we die."""
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
