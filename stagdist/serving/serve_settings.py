"""Options of the serve command to settings of the HTTP process. Everything is checked before anything is loaded."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, service_mark
from stagdist.errors import ConfigError
from stagdist.files import not_downloaded
from stagdist.serving.api.chat_template import ChatTemplate
from stagdist.serving.api.problems import ProblemError
from stagdist.serving.settings import KEYS_VARIABLE, PLAIN_TEMPLATE, ServerSettings, engine_socket

_MIB = 1 << 20
_LARGEST_MIB = 1 << 10


def server_settings(arguments: argparse.Namespace, environment: Mapping[str, str]) -> ServerSettings:
    """The settings of an HTTP process.

    Raises:
        ConfigError: an option is invalid, or a file cannot be read.
    """
    if not 1 <= arguments.port <= 65535:
        raise ConfigError(f"--port is {arguments.port}; clients need a known one, give 1 to 65535")
    if not 1 <= arguments.max_body_mib * _MIB < _LARGEST_MIB * _MIB:
        raise ConfigError(f"--max-body-mib is {arguments.max_body_mib:g}; give MiB above 0, below {_LARGEST_MIB}")
    for origin in arguments.cors_origins:  # browsers send it without a path, and compare all of it
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/]+", origin):
            raise ConfigError(f"--cors-origin is {origin!r}; give an origin without a path, https://example.org")
    if not re.fullmatch("(/.*)?", arguments.root_path):
        raise ConfigError(f"--root-path is {arguments.root_path!r}; give a path that begins with /")
    if not re.fullmatch("([a-zA-Z_:][a-zA-Z0-9_:]*)?", arguments.metrics_prefix):
        raise ConfigError(f"--metrics-prefix is {arguments.metrics_prefix!r}; give letters, digits, _ and :")
    job = environment.get(JOB_VARIABLE)
    owner = str(os.getpid()) if job is None else service_mark(job)
    given = {name: value for name, value in vars(arguments).items() if name in ServerSettings.model_fields}
    given |= {
        "engine_socket": str(engine_socket(arguments.host, arguments.port, owner)),
        "supervised": job is not None,
        "api_keys": _api_keys(arguments.api_key_file, environment),
        "max_body_bytes": int(arguments.max_body_mib * _MIB),
        "chat_template": _chat_template(arguments.chat_template),
    }
    try:
        settings = ServerSettings(**given)
        settings.model_dump_json()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option, reason = str(first["loc"][0]).replace("_", "-"), first["msg"]
        raise ConfigError(f"--{option} is {first['input']!r}: {reason[0].lower()}{reason[1:]}") from None
    except ValueError:
        raise ConfigError("--host, --served-model-name and --cors-origin must be UTF-8 text; one is not") from None
    return settings


def _api_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    if file is not None:
        place, given = f"--api-key-file {file}", _text("--api-key-file", file).splitlines()
    elif KEYS_VARIABLE in environment:
        place, given = KEYS_VARIABLE, environment[KEYS_VARIABLE].split(",")
    else:
        return ()
    keys = tuple(filter(None, map(str.strip, given)))
    if not keys:
        raise ConfigError(f"{place} holds no key, and everyone would be served; give keys, or remove it")
    if odd := next((number for number, key in enumerate(keys, 1) if not key.isprintable()), None):
        raise ConfigError(f"{place}: key {odd} has characters that no client can send; write letters and digits")
    return keys


def _chat_template(name: str | None) -> str | None:
    if name is None or name == PLAIN_TEMPLATE:
        return name
    source = _text("--chat-template", Path(name))
    try:
        ChatTemplate(source, {})
    except ProblemError as error:
        raise ConfigError(f"--chat-template {name}: {error}") from None
    if "messages" not in source:
        raise ConfigError(f"--chat-template {name} writes no `messages`; give a Jinja template, or `{PLAIN_TEMPLATE}`")
    return source


def _text(option: str, file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows may write a byte order mark
        problem = not_downloaded(file, text=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"{option} {file} cannot be read: {reason}") from None
    if problem is not None:
        raise ConfigError(f"{option} {problem}")
    return text
