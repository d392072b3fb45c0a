"""One attempt of a supervised run: started, watched, and ended on every host."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stagdist.cluster.hosts.hostfile import Host, hostfile_text
from stagdist.cluster.hosts.remote import Finished, on_all, run_here, run_on
from stagdist.cluster.hosts.start import Launch, Launcher, commands, environment_file, launcher_environment
from stagdist.cluster.supervision.agent import die_with_parent
from stagdist.cluster.supervision.diagnosis import (
    Fault,
    SilenceLimits,
    find_exit,
    find_missing,
    find_silence,
    steps_done,
)
from stagdist.cluster.supervision.messages import AGENT_ERROR, Job
from stagdist.cluster.supervision.rank_reports import RankReport, RankServer
from stagdist.files import writing

LOG = logging.getLogger(__name__)

WATCH_S = 0.1
FIRST_ERROR_S = 0.7
"""Seconds to wait for reports of an earlier error after a rank has failed."""

STACK_S = 2.5
FAREWELL_S = 2.0
LAUNCHER_S = 15.0
"""Seconds that the launcher may run after the last rank, or that ranks may be missing after the launcher has ended."""

SWEEP_S = 8.0


@dataclass(frozen=True)
class AttemptPlan:
    """What an attempt consists of."""

    number: int  # of the attempt, from 1
    launcher: Launcher  # that starts it
    launch: Launch  # where and how
    command: tuple[str, ...]  # script and arguments
    environment: Mapping[str, str]  # variables of the ranks
    address: str  # of this machine, for the agents
    logs: Path  # folder of this attempt
    limits: SilenceLimits  # of silence
    lease_s: float  # see `Job`
    stop_s: float  # see `Job`


@dataclass
class AttemptResult:
    """How an attempt ended."""

    fault: Fault | None  # None where all ranks ended with 0
    ranks: Mapping[int, RankReport]  # their last words
    noticed: float  # when the fault was seen, seconds since 1970
    ended: int = 0  # processes that had to be ended on the hosts
    left: int = 0  # processes that could not be
    dead: Mapping[str, str] = field(default_factory=dict)  # hosts that did not answer, with the reason
    last_heard: float = 0.0  # monotonic seconds, of the last message of a host that is dead now


class Attempt:
    """Runs one attempt.

    Args:
        plan: what to do.
        on_line: gets the output of rank 0.
        on_step: gets the steps done when training began, and every greater number once it is known.
    """

    def __init__(self, plan: AttemptPlan, on_line: Callable[[str], None], on_step: Callable[[int], None]):
        self._plan, self._on_step = plan, on_step
        self._token = secrets.token_hex(16)
        self._server = RankServer(self._token, plan.number, on_line)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._step = -1

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event) -> AttemptResult:
        """Run until all ranks have shut down cleanly or a fault is found. No process of the attempt is left afterwards.

        Args:
            stop: once set, ranks are asked for their orderly end.
            hurry: once set, they are ended as they are.
        """
        port = await self._server.start(self._plan.address)
        try:
            self._write_files(port)
            self._start()
            fault = await self._watch(stop, hurry)
            if fault is not None:
                LOG.warning("%s", fault.says)
            if fault is not None and fault.kind == "stuck" and fault.rank is not None:
                await self._stack_of(fault.rank)
            return await self._end(fault)
        except BaseException:
            await self._end(None)
            raise
        finally:
            await self._server.stop()
            self._plan.launch.job.unlink(missing_ok=True)

    def _write_files(self, port: int) -> None:
        plan, launch = self._plan, self._plan.launch
        plan.logs.mkdir(parents=True, exist_ok=True)
        launch.hostfile.write_text(hostfile_text(launch.hosts))
        with writing(launch.environment_file, private=True) as stream:
            stream.write(environment_file(launch, os.environ))
        Job(
            plan.command, str(launch.folder), plan.environment, plan.address, port, self._token, plan.number,
            str(plan.logs), plan.lease_s, plan.stop_s,
        ).write(launch.job)  # fmt: skip

    def _start(self) -> None:
        plan = self._plan
        environment = launcher_environment(plan.launcher, plan.launch, os.environ)
        with open(self._launcher_log, "ab", opener=_private) as log:
            for words in commands(plan.launcher, plan.launch):
                process = subprocess.Popen(
                    words, cwd=plan.launch.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, preexec_fn=die_with_parent(),
                )  # fmt: skip
                self._processes.append(process)

    @property
    def _launcher_log(self) -> Path:
        return self._plan.logs / "launcher.log"

    async def _watch(self, stop: asyncio.Event, hurry: asyncio.Event) -> Fault | None:
        ranks, limits, size = self._server.ranks, self._plan.limits, self._plan.launch.world_size
        started, stopping_since, launcher_gone = time.monotonic(), None, None
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            self._server.extend_deadlines(now - before - WATCH_S)
            self._follow_steps()
            if len(ranks) == size and all(view.exit_code == 0 for view in ranks.values()):
                return None
            if stop.is_set():
                if not ranks:
                    return None
                stopping_since = stopping_since or now
                self._server.send("stop")  # again and again: a rank may come late
            if hurry.is_set():
                return Fault("stuck", None, "", "a second signal ended the ranks as they were")
            if find_exit(ranks, now, size) is not None:
                await asyncio.sleep(FIRST_ERROR_S)
                in_order = stop.is_set() and stopped_before_work(ranks)
                return None if in_order else find_exit(ranks, time.monotonic(), size)
            fault = find_silence(ranks, now, limits) or find_missing(ranks, size, limits, now - started)
            if fault is None and len(ranks) < size:
                fault = self._agent_fault()
            if fault is None and all(process.poll() is not None for process in self._processes):
                launcher_gone = launcher_gone or now
                if now - launcher_gone > min(LAUNCHER_S, limits.host_s):
                    fault = self._launcher_fault()
            if fault is not None:
                return fault
            if stopping_since is not None and now - stopping_since > self._plan.stop_s + LAUNCHER_S:
                return Fault("stuck", None, "", f"ranks did not end within {self._plan.stop_s:.0f} s of being asked to")

    def _launcher_fault(self) -> Fault:
        if (known := self._agent_fault()) is not None:
            return known
        codes = [process.returncode for process in self._processes]
        lines = self._launcher_log.read_text(errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        says = f"the launcher ended with code {codes[0]} before its ranks; its last line: {said[:300]}"
        return Fault("launcher", None, "", says, codes[0], steps_done(self._server.ranks))

    def _agent_fault(self) -> Fault | None:
        """The error that an agent without a connection has written to the launcher's output."""
        with contextlib.suppress(OSError):
            for line in self._launcher_log.read_text(errors="replace").splitlines():
                if AGENT_ERROR in line:
                    return Fault("launcher", None, "", line.partition(AGENT_ERROR)[2][:500])
        return None

    def _follow_steps(self) -> None:
        first = max((view.first_step for view in self._server.ranks.values()), default=-1)
        for step in sorted({first, steps_done(self._server.ranks)}):
            if step > self._step:
                self._step = step
                self._on_step(step)

    async def _stack_of(self, rank: int) -> None:
        self._server.send("dump", rank)
        deadline = time.monotonic() + STACK_S
        while not self._server.ranks[rank].stack and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_S)

    async def _end(self, fault: Fault | None) -> AttemptResult:
        """End agents, launcher and what is left on the hosts, in this order."""
        ranks, noticed = self._server.ranks, time.time()
        if ranks and all(view.exit_code == 0 for view in ranks.values()):
            await self._wait_for_launcher()
        self._server.send("end")
        deadline = time.monotonic() + FAREWELL_S
        while time.monotonic() < deadline and any(view.exit_code is None for view in ranks.values()):
            await asyncio.sleep(WATCH_S)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel; it dies when it comes back
                await asyncio.to_thread(process.wait, FAREWELL_S)
        ended, left, dead = await asyncio.to_thread(
            sweep,
            self._plan.launcher,
            self._plan.launch.hosts,
            self._plan.launch.mark,
            self._plan.launch.folder,
            self._plan.logs,
        )
        heard = [view.heard_at for view in ranks.values() if view.exit_code is None]
        return AttemptResult(fault, dict(ranks), noticed, ended, left, dead, max(heard, default=0.0))

    async def _wait_for_launcher(self) -> None:
        deadline = time.monotonic() + LAUNCHER_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            await asyncio.sleep(WATCH_S)


def stopped_before_work(ranks: Mapping[int, RankReport]) -> bool:
    """Whether all ranks ended by the signal that asked them to, before there was anything to save."""
    return all(view.exit_code == -signal.SIGTERM and view.first_step < 0 for view in ranks.values())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def sweep(
    launcher: Launcher, hosts: tuple[Host, ...], mark: str, folder: Path, needs: Path
) -> tuple[int, int, dict[str, str]]:
    """End every process of the job on every host.

    Args:
        folder: to work in.
        needs: what every host must see.

    Returns: how many were ended, how many are left, and the hosts that cannot be used with the reason.
    """
    words = [sys.executable, "-m", "stagdist.cluster.hosts.leftovers", mark, "--end", "--needs", str(needs)]

    def on(host: str) -> Finished:
        return (
            run_here(words, SWEEP_S, folder=folder)
            if launcher == "local"
            else run_on(host, words, SWEEP_S, folder=folder)
        )

    ended, left, dead = 0, 0, {}
    for host, done in on_all([host.name for host in hosts], on).items():
        if not done.ok:
            dead[host] = done.reason
            continue
        try:
            # What a login script of the host prints comes first.
            report = json.loads((done.stdout.splitlines() or [""])[-1])
        except ValueError:
            dead[host] = f"its answer makes no sense: {done.stdout.strip()[-80:]!r}"
            continue
        ended, left = ended + len(report["ended"]), left + len(report["left"])
    return ended, left, dead
