"""What supervisor and agents send each other over an agent's pipes: a `Job`, then one JSON object per line."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LONGEST_LINE = 1 << 16
"""Bytes that are read at once, and longest line of output that is not split."""

LONGEST_MESSAGE = 1 << 20
"""Bytes: the last output of a rank may be 60 lines of 400 characters that take twelve bytes each."""

NOT_SHARED = "is not there: the file system that all hosts share is not mounted"
"""End of the problem of a host that does not see what it needs."""


@dataclass(frozen=True)
class Job:
    """What one agent does. Without slots it only ends what earlier starts of the run have left on its host."""

    run: str  # with which the marks of all processes of the supervised run begin: a hash of its folder
    needs: str  # path that the host must see
    lease_s: float  # seconds without word from the supervisor after which ranks end
    slots: int = 0  # ranks of the host
    first_rank: int = 0  # global rank of its first
    command: tuple[str, ...] = ()  # script and arguments of every rank; Python runs it
    folder: str = ""  # working directory
    environment: Mapping[str, str] = field(default_factory=dict)  # of every rank, including secrets
    logs: str = ""  # folder for the output of the ranks
    stop_s: float = 30.0  # seconds that a rank has for a clean shutdown
    keep_service: bool = False  # what serves clients between attempts stays: this is the host of rank 0

    @property
    def ranks(self) -> range:
        """Global ranks of the host."""
        return range(self.first_rank, self.first_rank + self.slots)

    def encoded(self) -> bytes:
        """The job as one line."""
        return encode("job", **asdict(self))


def read_job(line: bytes) -> Job:
    """The job of a line that `Job.encoded` made.

    Raises:
        ValueError: it is something else.
    """
    values = decode(line)
    if values.pop("kind") != "job":
        raise ValueError("no job")
    return Job(**{**values, "command": tuple(values["command"])})


def encode(kind: str, **content: Any) -> bytes:
    """A message as one line."""
    return json.dumps({"kind": kind, **content}).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message of a line.

    Raises:
        ValueError: it is none.
    """
    message = json.loads(line)
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError("no message of ours")
    return message
