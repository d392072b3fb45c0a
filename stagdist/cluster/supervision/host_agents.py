"""The supervisor's side of the agents: one process per host, whose pipes carry commands and reports."""

import asyncio
import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from stagdist.cluster.hosts.leftovers import kill_group
from stagdist.cluster.hosts.reach import StartCommand
from stagdist.cluster.supervision.messages import LONGEST_MESSAGE, Job, decode, encode
from stagdist.cluster.supervision.rank_reports import RankReport

AGENT = (sys.executable, "-m", "stagdist.cluster.supervision.agent")
PING_S = 1.0

LATE_S = 1.0
"""Seconds that this process may sleep too long before it takes itself for stopped (Ctrl-Z, a suspended machine)."""

CLEAR_S = 20.0
"""Seconds in which a host must have been cleared, connecting included."""

CLOSE_S = 2.0
LINES_KEPT = 20
"""Of what ssh, srun, or a login script of the host prints."""


class AgentStart(NamedTuple):
    """How the agent of a host is started, and what it does."""

    command: StartCommand
    job: Job


class HostAgent:
    """The agent of one host.

    Args:
        start: how it is started, and what it does.
        on_message: gets every message.

    Attributes:
        hello: its first message: the host's own name, its ranks, how many leftovers it ended, its problem.
        heard_at: monotonic seconds, of its last message, or of its start.
        ended: it has ended, or its connection is closed.
        done: it has shut down cleanly, so that nothing of its ranks is left on the host.
    """

    def __init__(self, start: AgentStart, on_message: Callable[[dict[str, Any]], None]):
        self._command, self.job = start
        self._on_message = on_message
        self.hello: dict[str, Any] | None = None
        self.heard_at = time.monotonic()
        self.ended = self.done = False
        self._process: asyncio.subprocess.Process | None = None
        self._printed, self._complaints = deque[str](maxlen=LINES_KEPT), deque[str](maxlen=LINES_KEPT)

    async def run(self) -> None:
        """Start it, and read until it has ended."""
        pipe, command = asyncio.subprocess.PIPE, self._command
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *command.words, cwd=command.folder, env=dict(command.environment), stdin=pipe, stdout=pipe,
                stderr=pipe, start_new_session=True, limit=LONGEST_MESSAGE,
            )  # fmt: skip
            self.send(self.job.encoded())
            assert process.stdout is not None and process.stderr is not None, "they are pipes"
            await asyncio.gather(self._listen(process.stdout), self._read_complaints(process.stderr))
            self.done = await process.wait() == 0 and self.hello is not None
        except OSError as error:
            self._complaints.append(f"{command.words[0]} cannot be started: {error.strerror}")
        finally:
            self._kill()
            if self._process is not None:
                with contextlib.suppress(TimeoutError):  # it is stuck in the kernel
                    await asyncio.wait_for(self._process.communicate(), CLOSE_S)
            self.ended = True

    def send(self, line: bytes) -> None:
        """Send a command, unless the connection is closed."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(line)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            kill_group(self._process.pid)

    @property
    def problem(self) -> str:
        """Why the host cannot be used, in one line; empty while nothing is known against it."""
        if self.hello is not None:
            return str(self.hello["problem"])
        said = self._complaints or self._printed
        return (said[-1] if said else "it gave no answer") if self.ended else ""

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        try:
            while line := await stream.readline():
                self._take(line)
        except (ValueError, KeyError, TypeError) as error:
            self._complaints.append(f"its agent wrote a message that cannot be read: {error}"[:300])
            self._kill()
            await stream.read()

    def _take(self, line: bytes) -> None:
        try:
            message = decode(line)
        except ValueError:  # a login script of the host printed it
            self._printed.append(line.decode(errors="replace").strip()[:300])
            return
        self.heard_at = time.monotonic()
        if message["kind"] == "hello":
            self.hello = message
        self._on_message(message)

    async def _read_complaints(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            if text := line.decode(errors="replace").strip():
                self._complaints.append(text[:300])


class HostAgents:
    """The agents of one attempt, and what they have reported.

    Args:
        agents: by host.
        on_line: gets every line of output of rank 0.

    Attributes:
        ranks: latest report of every rank whose agent has answered.
        agents: by host.
    """

    def __init__(self, agents: Mapping[str, AgentStart], on_line: Callable[[str], None]):
        self._on_line = on_line
        self.ranks: dict[int, RankReport] = {}
        self.agents = {host: HostAgent(start, self._take) for host, start in agents.items()}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start all agents, which start their ranks."""
        self._tasks = [asyncio.create_task(self._follow(agent)) for agent in self.agents.values()]
        self._tasks.append(asyncio.create_task(self._ping()))

    async def stop(self) -> None:
        """Close all connections at once. Agents that are still there take it as the supervisor's end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def send(self, kind: str, **content: Any) -> None:
        """Send a command to all agents."""
        for agent in self.agents.values():
            agent.send(encode(kind, **content))

    def at_work(self, since: float) -> bool:
        """Whether an agent that was heard after a time (monotonic seconds) has not ended."""
        return any(not agent.ended and agent.heard_at > since for agent in self.agents.values())

    def silent_hosts(self) -> list[str]:
        """Hosts whose agents did not shut down cleanly."""
        return [host for host, agent in self.agents.items() if not agent.done]

    def extend_deadlines(self, late_s: float) -> None:
        """Extend every deadline by the time this process was suspended: it is no missing heartbeat of a rank."""
        if late_s > LATE_S:
            now = time.monotonic()
            for view in self.ranks.values():
                view.heard_at = min(view.heard_at + late_s, now)

    def _take(self, message: dict[str, Any]) -> None:
        now, kind = time.monotonic(), message["kind"]
        if kind == "hello":
            for rank in message["ranks"]:
                self.ranks[rank] = RankReport(rank, str(message["host"]), heard_at=now)
        elif kind == "line":
            self._on_line(str(message["text"]))
        else:
            self.ranks[message["rank"]].take(message, now)

    async def _follow(self, agent: HostAgent) -> None:
        await agent.run()
        for rank in agent.job.ranks:
            if rank in self.ranks:
                self.ranks[rank].lost = self.ranks[rank].exit_code is None

    async def _ping(self) -> None:
        while True:
            self.send("ping")
            await asyncio.sleep(PING_S)


async def clear(agents: Mapping[str, AgentStart]) -> tuple[int, dict[str, str]]:
    """End what earlier attempts have left on hosts.

    Args:
        agents: by host, with jobs without slots.

    Returns: number of processes that were ended, and the hosts that cannot be used with the reason.
    """
    known = {host: HostAgent(start, lambda message: None) for host, start in agents.items()}
    tasks = {asyncio.create_task(agent.run()) for agent in known.values()}
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=CLEAR_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    ended = sum(agent.hello["ended"] for agent in known.values() if agent.hello is not None)
    return ended, {host: agent.problem for host, agent in known.items() if agent.problem}
