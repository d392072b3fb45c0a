"""Receives the reports of all agents of an attempt and sends commands to them."""

import asyncio
import contextlib
import hmac
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stagdist.cluster.supervision.messages import decode, encode
from stagdist.telemetry.pulse import Phase

HELLO_S = 10.0
"""Seconds in which a connection must have shown the job's token."""

PING_S = 1.0

LATE_S = 1.0
"""Seconds that this process may sleep too long before it takes itself for stopped (Ctrl-Z, a suspended machine)."""

LONGEST_MESSAGE = 1 << 20
"""Bytes: a rank's last words may be 60 lines of 400 characters that take twelve bytes each. A longer message would end
the connection, and with it the rank."""


@dataclass
class RankReport:
    """Latest report of one rank."""

    rank: int  # global
    host: str  # name that the host gives itself
    first_step: int = -1  # optimizer steps done when the script began to train; -1: unknown
    step: int = -1  # optimizer steps done; -1: unknown
    phase: Phase = Phase.START  # what it is busy with
    count: int = 0  # heartbeats so far; 0: the script has sent none
    age_s: float = 0.0  # of the last heartbeat at the time of the report
    process: str = "?"  # state letter of its process
    stopped_at: float | None = None  # monotonic seconds, when it was first seen stopped; None while it is not
    heard_at: float = 0.0  # monotonic seconds, of the last message
    exit_code: int | None = None  # of the script, negative after a signal; None while it runs
    exited_at: float = 0.0  # monotonic seconds
    ended_by_us: bool = False  # the supervisor ended it
    lost: bool = False  # the connection to its agent closed without an exit report
    tail: tuple[str, ...] = ()  # its last lines of output
    stack: tuple[str, ...] = ()  # Python stacks, where they were asked for

    def silent_s(self, now: float) -> float:
        """Seconds since its last sign of life."""
        return self.age_s + now - self.heard_at

    def take(self, message: dict[str, Any], now: float) -> None:
        """Store a message of the agent."""
        self.heard_at = now
        match message["kind"]:
            case "state":
                self.first_step, self.step = int(message["first_step"]), int(message["step"])
                self.phase, self.count = Phase(message["phase"]), int(message["count"])
                self.age_s, self.process = float(message["age_s"]), str(message["process"])
                self.stopped_at = (self.stopped_at or now) if self.process == "T" else None
            case "exit":
                self.exit_code, self.exited_at = int(message["code"]), now
                self.ended_by_us, self.tail = bool(message["ended"]), tuple(map(str, message["tail"]))
            case "stack":
                self.stack = tuple(map(str, message["lines"]))


class RankServer:
    """Listens for the agents of one attempt.

    Args:
        token: every agent must show it.
        attempt: whose agents are welcome.
        on_line: gets every line of output of rank 0.
    """

    def __init__(self, token: str, attempt: int, on_line: Callable[[str], None]):
        self._token, self._attempt, self._on_line = token, attempt, on_line
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.ranks: dict[int, RankReport] = {}

    async def start(self, address: str) -> int:
        """Listen on one address of this host and no other. Returns: the port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = await asyncio.start_server(self._serve, address, 0, family=family, limit=LONGEST_MESSAGE)
        self._pinging = asyncio.create_task(self._ping())
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close everything; agents that are still there take it as the supervisor's end."""
        self._pinging.cancel()
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, self._pinging, return_exceptions=True)

    def send(self, kind: str, rank: int | None = None) -> None:
        """Send a command to one rank, or to all ranks."""
        for number, writer in list(self._writers.items()):
            if rank in (None, number) and not writer.is_closing():
                writer.write(encode({"kind": kind}))

    def extend_deadlines(self, late_s: float) -> None:
        """Extend every deadline by the time this process was suspended: it is no missing heartbeat of a rank."""
        if late_s > LATE_S:
            now = time.monotonic()
            for view in self.ranks.values():
                view.heard_at = min(view.heard_at + late_s, now)

    async def _ping(self) -> None:
        while True:
            self.send("ping")
            await asyncio.sleep(PING_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "streams are served by tasks"
        self._tasks.add(task)
        rank = None
        try:
            hello = decode(await asyncio.wait_for(reader.readline(), HELLO_S))
            if not self._welcome(hello):
                return
            rank = int(hello["rank"])
            self._writers[rank] = writer
            view = self.ranks[rank] = RankReport(rank, str(hello["host"]), heard_at=time.monotonic())
            writer.write(encode({"kind": "welcome"}))  # only now does its script start
            while line := await reader.readline():
                message = decode(line)
                if message["kind"] == "line" and rank == 0:
                    self._on_line(str(message["text"]))
                view.take(message, time.monotonic())
        except (OSError, ValueError, KeyError, TypeError, TimeoutError, asyncio.CancelledError):
            pass  # not an agent, or the host is gone: missing heartbeats are detected elsewhere
        finally:
            if rank is not None and self._writers.get(rank) is writer:
                del self._writers[rank]
                self.ranks[rank].lost = self.ranks[rank].exit_code is None
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()
            self._tasks.discard(task)

    def _welcome(self, hello: dict[str, Any]) -> bool:
        token = str(hello.get("token", ""))
        known = hello["kind"] == "hello" and hmac.compare_digest(token.encode(), self._token.encode())
        return known and hello.get("attempt") == self._attempt and hello.get("rank") not in self._writers
