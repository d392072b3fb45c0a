"""Environment variables that ranks read from a private file, so that they do not appear on a command line."""

import os
import re
import shlex
import stat
from collections.abc import MutableMapping
from pathlib import Path

from stagdist.errors import ConfigError

PRIVATE_FILE = "STAGDIST_PRIVATE_ENV"
"""Variable that holds the path of the private file."""

VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def load_private(environment: MutableMapping[str, str] = os.environ) -> None:
    """Load the private file, if the environment names one, into the environment. Variables with a value are kept.

    Raises:
        ConfigError: the file is missing, damaged, or accessible to others.
    """
    name = environment.get(PRIVATE_FILE)
    if name is None:
        return
    remedy = "write it again with launch/doctor.py --write-env"
    try:
        with Path(name).open() as stream:
            status = os.fstat(stream.fileno())
            if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise ConfigError(f"{PRIVATE_FILE} {name} can be read or changed by others; chmod 600 it, or {remedy}")
            words = shlex.split(stream.read())
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{PRIVATE_FILE} {name} cannot be read: {reason}; {remedy}") from error
    for word in words:
        key, found, value = word.partition("=")
        if not found or not VARIABLE_NAME.fullmatch(key):
            raise ConfigError(f"{PRIVATE_FILE} {name} is damaged: it contains more than NAME=VALUE lines; {remedy}")
        if not environment.get(key):  # an empty value on the command line is a placeholder
            environment[key] = value
