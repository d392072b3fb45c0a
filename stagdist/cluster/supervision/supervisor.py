"""Supervises a run: starts it, detects failures and hangs, stops the remaining processes, and restarts it."""

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.reach import StartWay, address_of, choose_way, start_command
from stagdist.cluster.supervision.attempt import Attempt, AttemptResult
from stagdist.cluster.supervision.diagnosis import USER_ERROR_CODE, Fault
from stagdist.cluster.supervision.events import EventLog
from stagdist.cluster.supervision.host_agents import AGENT, AgentStart, clear
from stagdist.cluster.supervision.messages import Job
from stagdist.cluster.supervision.options import SupervisorOptions, only_supervisor
from stagdist.cluster.supervision.placement import (
    listed_hosts,
    refuse_unusable,
    useless_spares,
    with_fewer,
    with_spares,
)
from stagdist.errors import ConfigError, StagdistError

LOG = logging.getLogger(__name__)

PORTS = range(20000, 32000)
"""Of the ranks' meeting place: below those that systems give away by themselves."""

LOCK = "supervisor.lock"
"""File in the run's folder: one supervisor holds it, and every host must see it."""

LONGEST_PAUSE_S = 60.0
ONE_SIGNAL_S = 2.0
"""Seconds in which signals count as one: a closed terminal may send several."""

PROBE_S = 2.0
"""Between two questions whether a host is back."""


class GaveUpError(StagdistError):
    """The run cannot continue; the message gives the reason in one line."""


class Supervisor:
    """Runs attempt after attempt.

    Args:
        options: what and how.
        on_line: gets the output of rank 0.
    """

    def __init__(self, options: SupervisorOptions, on_line: Callable[[str], None]):
        self._options, self._on_line = options, on_line
        self._placement = options.placement
        self._history = EventLog(options.folder / "run.json", options.command)
        self._run = hashlib.sha256(str(options.folder.resolve()).encode()).hexdigest()[:12]
        self._way: StartWay = options.start_with or "ssh"
        self._stop_signal, self._asked_at = 0, 0.0
        self._lock = options.folder / LOCK
        self._number = self._earlier_attempts()
        self._first_known: int | None = None
        self._fault: Fault | None = None
        self._last_fault: Fault | None = None
        self._reached = self._resumed = -1
        self._restarts = 0
        self._progressed = self._at_work = False

    async def run(self) -> int:
        """Until the run has ended. Returns: exit code; 128 + signal after a signal.

        Raises:
            GaveUpError: the run cannot continue.
            ConfigError: another supervisor is at work on it, or its folder cannot be written.
        """
        for spare in useless_spares(self._options.placement):
            LOG.warning("spare %s has %d slots, fewer than any host: it will never be used", spare.name, spare.slots)
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell that starts it in the background
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        with only_supervisor(self._lock):
            try:
                return await self._go_on()
            except StagdistError as reason:
                self._history.note("stop", reason=str(reason), code=2 if isinstance(reason, ConfigError) else 1)
                raise
            finally:
                if self._options.serves:
                    await self._clear(self._placement.hosts[:1], services=True)
                self._history.close()

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            if time.monotonic() - self._asked_at > ONE_SIGNAL_S:
                LOG.warning("%s again: the ranks are ended as they are", signal.Signals(number).name)
                self._hurry.set()
            return
        self._asked_at = time.monotonic()
        what = "the ranks are asked to save and end" if self._at_work else "no ranks are at work; ending"
        LOG.warning("%s: %s", signal.Signals(number).name, what)
        self._stop_signal = number
        self._stop.set()

    async def _go_on(self) -> int:
        placement = self._placement
        # Name lookups and ssh take their time; signals are heard meanwhile.
        self._way = await asyncio.to_thread(choose_way, self._options.start_with, placement.hosts)
        # An earlier supervisor may have put a spare to work.
        useless = await self._clear(placement.hosts + placement.spares, services=True)
        dead = {host.name: useless[host.name] for host in self._hosts(useless)}
        refuse_unusable(dead)
        # What an earlier supervisor left on a host that does not answer may live for its lease from now on.
        await self._replace_dead(dead, time.monotonic())
        if self._stop.is_set():
            return self._stopped(None)
        pause_s = 1.0
        while True:
            outcome = await self._attempt()
            dead = await self._clear(self._hosts(outcome.silent))
            self._note_end(outcome, dead)
            if self._stop.is_set():
                return self._stopped(outcome)
            if outcome.fault is None:
                self._history.note("finish", attempt=self._number, code=0)
                LOG.info("all ranks have shut down cleanly")
                return 0
            self._check_hope(outcome.fault)
            self._restarts += 1
            pause_s = 1.0 if self._progressed else min(2 * pause_s, LONGEST_PAUSE_S)
            await self._replace_dead(dead, outcome.last_heard)
            await self._wait(pause_s if self._restarts > 1 else 0.0)
            if self._stop.is_set():
                return self._stopped(outcome)

    async def _attempt(self) -> AttemptResult:
        self._number += 1
        self._first_known, self._progressed = None, False
        hosts = [f"{host.name}:{host.slots}" for host in self._placement.hosts]
        self._history.note("start", attempt=self._number, hosts=hosts, start_with=self._way)
        LOG.info("attempt %d on %s", self._number, ", ".join(hosts))
        self._at_work = True
        try:
            agents = await asyncio.to_thread(self._agents)  # looks up names
            attempt = Attempt(agents, self._options.limits, self._on_line, self._on_step)
            return await attempt.run(self._stop, self._hurry)
        except OSError as error:  # no space for the files of an attempt
            first = f"first error: {self._fault.says}; then " if self._fault is not None else ""
            where = f"{error.filename}: " if error.filename else ""
            raise GaveUpError(
                f"{first}attempt {self._number} could not start: {where}{error.strerror or error}"
            ) from error
        finally:
            self._at_work = False

    def _agents(self) -> dict[str, AgentStart]:
        """Agents that run the ranks of an attempt.

        Raises:
            OSError: the folder for their output cannot be made.
        """
        options, hosts = self._options, self._placement.hosts
        logs = options.folder / "logs" / f"attempt_{self._number:03d}"
        logs.mkdir(parents=True, exist_ok=True)
        meeting = {"MASTER_ADDR": address_of(hosts), "MASTER_PORT": str(random.choice(PORTS))}
        world, mark = {"WORLD_SIZE": str(self._placement.world_size)}, self._new_mark()
        agents, first_rank = {}, 0
        for host in hosts:
            variables = {**options.environment, **meeting, **world, "LOCAL_WORLD_SIZE": str(host.slots)}
            job = Job(
                self._run, str(logs), options.lease_s, host.slots, first_rank, options.command, str(Path.cwd()),
                variables, str(logs), options.stop_s, keep_service=not first_rank,
            )  # fmt: skip
            agents[host.name] = self._agent(host, job, mark)
            first_rank += host.slots
        return agents

    def _new_mark(self) -> str:
        return f"{self._run}.{secrets.token_hex(4)}"

    def _agent(self, host: Host, job: Job, mark: str) -> AgentStart:
        return AgentStart(start_command(host.name, self._way, AGENT, Path.cwd(), mark, job.lease_s), job)

    async def _clear(self, hosts: Iterable[Host], *, services: bool = False) -> dict[str, str]:
        """End what earlier attempts have left on hosts, because it might continue to write.

        Args:
            services: also what serves clients between attempts on the host of rank 0.

        Returns: hosts that cannot be used, with the reason.
        """
        mark, first = self._new_mark(), None if services else self._placement.hosts[0]

        def agents() -> dict[str, AgentStart]:
            job = Job(self._run, str(self._lock), self._options.lease_s)
            return {host.name: self._agent(host, replace(job, keep_service=host == first), mark) for host in hosts}

        ended, dead = await clear(await asyncio.to_thread(agents))
        if ended:
            self._history.note("cleared", ended=ended)
            LOG.warning("%d processes that an earlier start had left were ended", ended)
        return dead

    def _on_step(self, step: int) -> None:
        if self._first_known is None:
            self._first_known = step
            if step > self._resumed:  # a checkpoint that no attempt before began from
                self._resumed, self._restarts = step, 0
            lost = max(0, self._reached - step) if self._fault is not None else 0
            self._reached = step
            self._history.note("resume", attempt=self._number, step=step, lost_steps=lost)
            self._fault = None
            LOG.info("attempt %d begins at step %d%s", self._number, step, f", {lost} steps were lost" if lost else "")
        elif not self._progressed:
            self._progressed = True
            self._history.note("step", attempt=self._number, step=step)

    def _note_end(self, outcome: AttemptResult, dead: Mapping[str, str]) -> None:
        fault = outcome.fault
        if fault is not None:
            view = outcome.ranks.get(-1 if fault.rank is None else fault.rank)
            self._history.note(
                "fault",
                attempt=self._number,
                kind=fault.kind,
                rank=fault.rank,
                host=fault.host,
                says=fault.says,
                step=fault.step,
                noticed=outcome.noticed,
                stack=list(view.stack) if view else [],
            )
            for line in view.stack if view else ():
                LOG.warning("    %s", line)
        self._history.note("ended", attempt=self._number, dead=dict(dead))

    def _check_hope(self, fault: Fault) -> None:
        """Give up where another attempt would only end like this one.

        Raises:
            GaveUpError: with the first error.
        """
        if self._options.serves and self._first_known is not None:
            self._restarts, self._last_fault = 0, None
        first = f"first error: {fault.says}"
        first += " " if first[-1] in ".?!" else "; "
        logs = f"output of the ranks: {self._options.folder / 'logs' / f'attempt_{self._number:03d}'}"
        if fault.kind == "exit" and fault.code == USER_ERROR_CODE:
            raise GaveUpError(f"{first}starting again would not help. {logs}")
        before = self._last_fault
        if before is not None and fault.own and before.same_again == fault.same_again:
            raise GaveUpError(f"{first}the same as the time before, after the same step. {logs}")
        if self._restarts >= self._options.max_restarts:
            raise GaveUpError(
                f"{first}--max-restarts {self._options.max_restarts} is reached without a new checkpoint. {logs}"
            )
        self._last_fault = self._fault = fault
        # An attempt that fails before it trains reports no step.
        self._reached = max(self._reached, fault.step)

    async def _replace_dead(self, dead: Mapping[str, str], last_heard: float) -> None:
        """Find hosts for the next attempt.

        Args:
            dead: hosts that did not answer, with the reason.
            last_heard: monotonic seconds, when their ranks were alive.

        Raises:
            GaveUpError: a host is gone and nothing can take its place.
        """
        if not dead:
            return
        LOG.warning("hosts that do not answer: %s", listed_hosts(dead))
        # Its ranks may be alive behind a cut link: they end when their lease does, and must not write beside new ones.
        wait_s = last_heard + self._options.lease_s + PROBE_S - time.monotonic()
        await self._wait(wait_s)
        gone, ask_again, deadline = dict(dead), wait_s > PROBE_S, None  # else they did not answer just now
        while not self._stop.is_set():
            useless = await self._clear([*self._hosts(gone if ask_again else ()), *self._placement.spares])
            if ask_again:
                gone = {host: useless[host] for host in gone if host in useless}
            if not gone or self._replaced(gone, useless):
                return
            if deadline is None:
                LOG.warning("waiting up to %.0f s for %s", self._options.host_wait_s, ", ".join(sorted(gone)))
                deadline = time.monotonic() + self._options.host_wait_s
            if time.monotonic() >= deadline:
                raise GaveUpError(
                    f"{', '.join(sorted(gone))} did not come back within {self._options.host_wait_s:.0f} s "
                    f"({listed_hosts(gone)}), and no spare is left: list one in the hostfile (#spare name slots=N), or "
                    "allow fewer replicas with --min-data-parallel"
                )
            await self._wait(PROBE_S)
            ask_again = True

    def _replaced(self, gone: Mapping[str, str], useless: Collection[str]) -> bool:
        """Whether spares take the place of hosts, or fewer replicas continue."""
        new, how = with_spares(self._placement, gone, lambda spare: spare not in useless), "a spare takes the place"
        if new is None and self._options.fits is not None:
            new, how = with_fewer(self._placement, gone, self._options.fits), "fewer replicas continue instead"
        if new is None:
            return False
        self._placement = new
        hosts = [f"{host.name}:{host.slots}" for host in new.hosts]
        self._history.note("replace", lost=sorted(gone), how=how, hosts=hosts)
        LOG.warning("%s of %s: now on %s", how, ", ".join(sorted(gone)), ", ".join(hosts))
        return True

    def _hosts(self, names: Collection[str]) -> list[Host]:
        return [host for host in self._placement.hosts if host.name in names]

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(0.0, seconds))

    def _stopped(self, outcome: AttemptResult | None) -> int:
        code = 128 + self._stop_signal
        how = "the ranks have shut down cleanly"
        if outcome is None:
            how = "before any rank was started"
        elif outcome.fault is not None:
            how = f"the ranks have ended, but not cleanly: {outcome.fault.says}"
        name = signal.Signals(self._stop_signal).name
        self._history.note("stop", reason=f"{name}; {how}", code=code)
        LOG.info("%s: %s", name, how)
        return code

    def _earlier_attempts(self) -> int:
        names = (self._options.folder / "logs").glob("attempt_*")
        return max((int(path.name.removeprefix("attempt_")) for path in names if path.name[8:].isdigit()), default=0)
