"""Hostfiles: the hosts of a cluster, in the format that DeepSpeed reads, with optional spares."""

import re
from dataclasses import dataclass
from pathlib import Path

from stagdist.errors import ConfigError

_ENTRY = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[0-9]{1,4})\s*(?:#.*)?")
_SPARE = re.compile(r"#\s*(?:spare|(?i:spare)(?=.*\sslots=))\s+(?P<entry>.*)")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str  # what ssh calls it: a host name or an IPv4 address
    slots: int  # ranks it can run

    def __post_init__(self) -> None:
        check_host_name(self.name)
        if self.slots < 1:
            raise ConfigError(f"host {self.name} has slots={self.slots}; give at least 1, or leave the host out")


@dataclass(frozen=True)
class Hostfile:
    """Hosts in the order of their ranks."""

    hosts: tuple[Host, ...]  # that work
    spares: tuple[Host, ...] = ()  # that replace one of them when it dies


def check_host_name(name: str) -> None:
    """Refuse a name that a launcher or a shell could interpret.

    Raises:
        ConfigError: it holds other characters than letters, digits, dots, hyphens and underscores, or is too long.
    """
    if len(name) > 253 or not _NAME.fullmatch(name):
        remedy = "; enter an IPv6 address in /etc/hosts, and write its name here" if ":" in name else ""
        raise ConfigError(
            f"host name {name[:80]!r} is refused: letters, digits, dots, hyphens and underscores only, "
            f"beginning and ending with a letter or digit{remedy}"
        )


def read_hostfile(path: str | Path) -> Hostfile:
    """Read `name slots=N` lines; `#spare name slots=N` names a spare, which DeepSpeed takes for a comment.

    Raises:
        ConfigError: it cannot be read, or a line says something else; names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # editors on Windows may write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"hostfile {path} cannot be read: {reason}; hostfile.example shows what it holds") from error
    hosts: list[Host] = []
    spares: list[Host] = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        spare = _SPARE.fullmatch(line)
        if not line or (line.startswith("#") and not spare):
            continue
        host = _host(spare["entry"] if spare else line, f"{path}, line {number}")
        if host.name.lower() in (known.name.lower() for known in hosts + spares):
            raise ConfigError(f"{path}, line {number}: host {host.name} is listed twice")
        (spares if spare else hosts).append(host)
    if not hosts:
        raise ConfigError(f"hostfile {path} lists no hosts; write lines such as: node1 slots=8")
    return Hostfile(tuple(hosts), tuple(spares))


def _host(entry: str, where: str) -> Host:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(f"{where}: {entry[:80]!r} is no host; write: name slots=N (at most 9999)")
    user, at, host = match["name"].partition("@")
    if at:
        raise ConfigError(
            f"{where}: {match['name'][:80]!r} names a user; write the host alone here, and `Host {host[:80]}` with "
            f"`User {user[:80]}` into ~/.ssh/config"
        )
    try:
        return Host(match["name"], int(match["slots"]))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
