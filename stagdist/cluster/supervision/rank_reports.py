"""The latest report of each rank, as the supervisor knows it."""

from dataclasses import dataclass
from typing import Any

from stagdist.telemetry.pulse import Phase


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
