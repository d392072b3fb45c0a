"""One attempt of a supervised run: started, watched, and ended on every host."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stagdist.cluster.supervision.diagnosis import MISSED_S, Fault, SilenceLimits, find_exit, find_silence, steps_done
from stagdist.cluster.supervision.host_agents import AgentStart, HostAgents
from stagdist.cluster.supervision.rank_reports import RankReport

LOG = logging.getLogger(__name__)

WATCH_S = 0.1
FIRST_ERROR_S = 0.7
"""Seconds to wait for reports of an earlier error after a rank has failed."""

HELLO_S = 60.0
"""Seconds in which every agent must have answered."""

STACK_S = 2.5
FAREWELL_S = 5.0
"""Seconds that agents have to end their ranks and what these have started."""

STOP_GRACE_S = 15.0
"""Seconds that ranks may take to end beyond the time that they have for it."""


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended."""

    fault: Fault | None  # None where all ranks ended with 0
    ranks: Mapping[int, RankReport]  # their last words
    noticed: float  # when the fault was seen, seconds since 1970
    silent: Sequence[str]  # hosts whose agent did not shut down cleanly: processes may be left there
    last_heard: float  # monotonic seconds, of the last message of a rank that did not report its end


class Attempt:
    """Runs one attempt.

    Args:
        agents: by host, how its agent is started, and its job.
        limits: of silence.
        on_line: gets the output of rank 0.
        on_step: gets the steps done when training began, and every greater number once it is known.
    """

    def __init__(
        self,
        agents: Mapping[str, AgentStart],
        limits: SilenceLimits,
        on_line: Callable[[str], None],
        on_step: Callable[[int], None],
    ):
        self._agents = HostAgents(agents, on_line)
        self._size = sum(start.job.slots for start in agents.values())
        self._stop_s = max(start.job.stop_s for start in agents.values())
        self._limits, self._on_step = limits, on_step
        self._step = -1

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event) -> AttemptResult:
        """Run until all ranks have shut down cleanly or a fault is found. No rank of the attempt is left afterwards.

        Args:
            stop: once set, ranks are asked to shut down cleanly.
            hurry: once set, they are ended as they are.
        """
        self._agents.start()
        try:
            fault = await self._watch(stop, hurry)
            noticed = time.time()
            if fault is not None:
                LOG.warning("%s", fault.says)
            if fault is not None and fault.kind == "stuck" and fault.rank is not None:
                await self._stack_of(fault.rank)
            await self._end()
            ranks = self._agents.ranks
            heard = [view.heard_at for view in ranks.values() if view.exit_code is None]
            return AttemptResult(fault, ranks, noticed, self._agents.silent_hosts(), max(heard, default=0.0))
        finally:
            await self._agents.stop()

    async def _watch(self, stop: asyncio.Event, hurry: asyncio.Event) -> Fault | None:
        ranks, limits = self._agents.ranks, self._limits
        started, stopping_since = time.monotonic(), None
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            self._agents.extend_deadlines(now - before - WATCH_S)
            self._follow_steps()
            if len(ranks) == self._size and all(view.exit_code == 0 for view in ranks.values()):
                return None
            if stop.is_set():
                if not ranks:
                    return None
                stopping_since = stopping_since or now
                self._agents.send("stop")  # repeated, because an agent may start late
            if hurry.is_set():
                return Fault("stuck", None, "", "a second signal ended the ranks as they were")
            if find_exit(ranks, now) is not None:
                await asyncio.sleep(FIRST_ERROR_S)
                clean = stop.is_set() and stopped_before_work(ranks)
                return None if clean else find_exit(ranks, time.monotonic())
            fault = find_silence(ranks, now, limits) or self._missing(now - started)
            if fault is not None:
                return fault
            if stopping_since is not None and now - stopping_since > self._stop_s + STOP_GRACE_S:
                return Fault("stuck", None, "", f"ranks did not end within {self._stop_s:.0f} s of being asked to")

    def _missing(self, waited_s: float) -> Fault | None:
        """A host whose agent could not be started, or gave no answer; or all agents have ended by themselves."""
        ranks = self._agents.ranks
        for host, agent in self._agents.agents.items():
            problem = agent.problem
            if agent.hello is None and waited_s > HELLO_S:
                problem = problem or f"no answer within {HELLO_S:.0f} s"
            if problem:
                says = f"rank {agent.job.first_rank} could not be started on {host}: {problem}"
                return Fault("missing", agent.job.first_rank, host, says, step=steps_done(ranks))
        if all(agent.ended for agent in self._agents.agents.values()):
            first = min(ranks.values(), key=lambda view: view.exited_at)
            says = f"rank {first.rank} on {first.host} was ended by its agent, which heard nothing from the supervisor"
            return Fault("silent", first.rank, first.host, says, step=steps_done(ranks))
        return None

    def _follow_steps(self) -> None:
        ranks = self._agents.ranks
        first = max((view.first_step for view in ranks.values()), default=-1)
        for step in sorted({first, steps_done(ranks)}):
            if step > self._step:
                self._step = step
                self._on_step(step)

    async def _stack_of(self, rank: int) -> None:
        self._agents.send("dump", rank=rank)
        deadline = time.monotonic() + STACK_S
        while not self._agents.ranks[rank].stack and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_S)

    async def _end(self) -> None:
        """End all ranks. Agents end when their ranks have, and what these have started."""
        self._agents.send("end")
        deadline = time.monotonic() + FAREWELL_S
        while (now := time.monotonic()) < deadline and self._agents.at_work(now - MISSED_S):
            await asyncio.sleep(WATCH_S)


def stopped_before_work(ranks: Mapping[int, RankReport]) -> bool:
    """Whether all ranks ended by the signal that asked them to, before there was anything to save."""
    codes = (-signal.SIGTERM, 128 + signal.SIGTERM)
    return all(view.exit_code in codes and view.first_step < 0 for view in ranks.values())
