"""The job file that the supervisor writes for the agents of one attempt, and the messages between them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stagdist.errors import ConfigError
from stagdist.files import writing

LONGEST_LINE = 1 << 16
"""Bytes that are read at once, and longest line of output that is not split."""

AGENT_ERROR = "error: agent: "
"""Prefix of the line in which an agent reports why it starts no script. The line is in the launcher's output."""


@dataclass(frozen=True)
class Job:
    """One attempt of a supervised run."""

    command: tuple[str, ...]  # script and arguments of every rank; Python runs it
    folder: str  # working directory
    environment: Mapping[str, str]  # variables of every rank, including secrets, in addition to those of the launcher
    address: str  # where the supervisor listens, with `port`
    port: int
    token: str  # proves to the supervisor that a message is of this job
    attempt: int  # from 1
    logs: str  # folder for the output of the ranks
    lease_s: float  # seconds without word from the supervisor after which a rank ends
    stop_s: float = field(default=30.0)  # seconds that a rank has for a clean shutdown

    def write(self, path: Path) -> None:
        """Store it, readable by its owner alone."""
        with writing(path, private=True) as stream:
            stream.write(json.dumps(asdict(self), indent=1) + "\n")


def read_job(path: str | Path) -> Job:
    """Read the file that `Job.write` wrote.

    Raises:
        ConfigError: it is not there, or is something else.
    """
    try:
        values = json.loads(Path(path).read_text())
        return Job(**{**values, "command": tuple(values["command"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"job {path} cannot be read: {error}; launch/run.py writes it into the run's folder, which all hosts must "
            "share"
        ) from error


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as one line."""
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message of a line.

    Raises:
        ValueError: it is none.
    """
    message = json.loads(line)
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError("no message of ours")
    return message
