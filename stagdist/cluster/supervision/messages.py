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
    """One attempt of a supervised run.

    Attributes:
        command: script and arguments of every rank; Python runs it.
        folder: working directory.
        environment: variables of every rank, including secrets, in addition to those of the launcher.
        address: where the supervisor listens, with `port`.
        token: proves to the supervisor that a message is of this job.
        attempt: from 1.
        logs: folder for the output of the ranks.
        lease_s: seconds without word from the supervisor after which a rank ends.
        stop_s: seconds that a rank has for a clean shutdown.
    """

    command: tuple[str, ...]
    folder: str
    environment: Mapping[str, str]
    address: str
    port: int
    token: str
    attempt: int
    logs: str
    lease_s: float
    stop_s: float = field(default=30.0)

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
