"""Settings of the HTTP process; rank 0 writes them as JSON to its standard input, since arguments are public."""

import hashlib
import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from stagdist.errors import ConfigError

PLAIN_TEMPLATE = "plain"
"""`chat_template` that names speakers in the text, for base models: `User: ...`, `Assistant: ...`."""

KEYS_VARIABLE = "STAGDIST_API_KEYS"
"""Variable with API keys, separated by commas."""

_LONGEST_SOCKET = 107
"""Bytes of the path of a Unix socket on Linux."""


class ServerSettings(BaseModel):
    """What the HTTP process is started with.

    Attributes:
        engine_socket: Unix socket on which it listens for rank 0; see `engine_socket`.
        supervised: a supervisor starts the engine again; otherwise the HTTP process ends with the engine.
        names: names of the model in requests, the first one in answers; empty takes those that rank 0 sends.
        any_model: serve requests for models of other names too.
        api_keys: requests below /v1 need one of them; empty asks for none.
        max_body_bytes: limit of a request's body.
        max_queued_requests: limit of requests whose answer has not begun, in this process and in the engine.
        chat_template: a Jinja template that replaces the model's, or `PLAIN_TEMPLATE`.
        root_path: prefix of all paths that a proxy removes.
        cors_origins: origins whose pages may call the server.
        metrics_prefix: prefix of the names of metrics, with its colon.
        body_timeout_s: limit for receiving a request.
        keep_alive_s: an idle connection is kept for so long; more than the proxy's in front.
        hang_timeout_s: limit for an operation of the engine and for its signs of life.
        drain_timeout_s: limit for the requests that run when the server stops.
        restart_timeout_s: limit for the supervisor to start the engine again.
        access_log: one line per request to standard error, without prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    engine_socket: str
    supervised: bool = False
    names: tuple[str, ...] = ()
    any_model: bool = False
    api_keys: tuple[str, ...] = Field((), repr=False)
    max_body_bytes: int = Field(8 * 2**20, ge=1)
    max_queued_requests: int = Field(256, ge=1)
    chat_template: str | None = None
    root_path: str = ""
    cors_origins: tuple[str, ...] = ()
    metrics_prefix: str = "stagdist:"
    keep_alive_s: int = Field(75, ge=1)
    body_timeout_s: float = Field(30, gt=0)
    hang_timeout_s: float = Field(30, gt=0)
    drain_timeout_s: float = Field(25, ge=0)
    restart_timeout_s: float = Field(120, gt=0)
    access_log: bool = True

    def fingerprint(self) -> str:
        """sha256 of the settings, which contain keys."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def engine_socket(host: str, port: int, owner: str) -> Path:
    """Path of the Unix socket of a server, in a folder that only this user can enter.

    Args:
        owner: the supervised run, whose next rank 0 finds the socket again; else a name that no other server has.

    Raises:
        ConfigError: the folder cannot be made, belongs to someone else or others can enter it; the path is too long.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"stagdist-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"no folder for a socket: {error}; set TMPDIR to a folder that can be written") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        access = f"{folder} belongs to another user, or is open to other users (mode {found.st_mode & 0o777:o})"
        raise ConfigError(f"{access}; remove it, or set TMPDIR to another folder")
    path = folder / f"{host}-{port}.{owner}.sock"
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise ConfigError(f"{path} is too long for a socket; set TMPDIR to a folder with a shorter path")
    return path
