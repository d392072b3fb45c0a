"""The environment variables of the ranks: what `.deepspeed_env` contains, and what it should contain."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagdist.cluster.doctor.facts import NOTE, PROBLEM, Finding, HostFacts
from stagdist.cluster.hosts.shell_variables import (
    DEEPSPEED_ENV,
    EXPORTED_BY_DEEPSPEED,
    PREFIXES,
    is_credential,
    is_plain,
    is_secret,
    may_be_shown,
    rank_variables,
    write_deepspeed_env,
)

PRIVATE_NAME = ".stagdist_private_env"
INTERFACE_NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
ROW = "environment"
WRITE = "write it with launch/doctor.py --write-env"

_LINE = re.compile(r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=(?P<value>.*)")


@dataclass(frozen=True)
class ForwardedVariables:
    """What DeepSpeed will hand on to the ranks."""

    variables: dict[str, str]  # those that are safe to forward
    findings: tuple[Finding, ...] = ()  # what is wrong with the rest, or with there being none


def read_deepspeed_env(folder: Path, environment: Mapping[str, str] = os.environ) -> ForwardedVariables:
    """Read the files that DeepSpeed reads when it is started in `folder`: the one at home, then the one there."""
    name = environment.get("DS_ENV_FILE", DEEPSPEED_ENV)
    paths = dict.fromkeys(place / name for place in (Path(environment.get("HOME", "/")), folder))
    variables: dict[str, str] = {}
    findings: list[Finding] = []
    read = [path for path in paths if path.is_file()]
    for path in read:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            problem = _wrong(line, f"{path}, line {number}")
            if problem is None:
                match = _LINE.fullmatch(line)
                assert match is not None
                variables[match["name"]] = match["value"].strip()
            else:
                findings.append(problem)
    left = _left_behind(environment) if not read else []
    if left:
        what = f"there is no {DEEPSPEED_ENV}, so ranks on other hosts will not see {', '.join(left)}"
        findings.append(Finding(NOTE, ROW, (), what, WRITE))
    if shown := _shown(environment, variables):
        what = "DeepSpeed by itself writes what is secret or a shell could run into the command lines of all hosts: "
        what += ", ".join(shown)
        findings.append(Finding(NOTE, ROW, (), what, WRITE))
    return ForwardedVariables(variables, tuple(findings))


def _wrong(line: str, where: str) -> Finding | None:
    match = _LINE.fullmatch(line)
    if match is None:
        return Finding(PROBLEM, ROW, (), f"{where} is not NAME=VALUE, and DeepSpeed would fail on it", WRITE)
    if not is_plain(match["value"].strip()):
        what = f"{where}: {match['name']} holds characters that a shell on the hosts would split or run"
        return Finding(PROBLEM, ROW, (), what, WRITE)
    if is_secret(match["name"], match["value"].strip()):
        what = f"{where}: {match['name']} would be visible in the process lists of all hosts"
        return Finding(PROBLEM, ROW, (), what, WRITE)
    return None


def _left_behind(environment: Mapping[str, str]) -> list[str]:
    return [
        name
        for name in rank_variables(environment)
        if (name.startswith(PREFIXES) or is_credential(name)) and not name.startswith(EXPORTED_BY_DEEPSPEED)
    ]


def _shown(environment: Mapping[str, str], replaced: Mapping[str, str]) -> list[str]:
    """Variables of the shell that DeepSpeed forwards by default although they may not be on a command line."""
    return [
        name
        for name, value in rank_variables(environment).items()
        if name.startswith(EXPORTED_BY_DEEPSPEED) and name not in replaced and not may_be_shown(name, value)
    ]


def common_route(facts: Iterable[HostFacts]) -> str | None:
    """The interface towards the other hosts, where it has the same name everywhere."""
    routes = {fact.route for fact in facts}
    return routes.pop() if len(routes) == 1 else None


def needs_interface(facts: Iterable[HostFacts]) -> list[str]:
    """Names (their own) of hosts on which gloo would listen where no other host can reach it."""
    return [fact.hostname for fact in facts if fact.own_interface in (None, "lo")]


def master_address(hosts: Sequence[str], facts: Mapping[str, HostFacts]) -> str:
    """What ranks call the first host: its name, or its address where the name means something else to itself."""
    first = hosts[0]
    own = facts[first].addresses.get(first) if first in facts else None
    if own is not None and own.startswith("127."):
        for host in hosts[1:]:
            seen = facts[host].addresses.get(first) if host in facts else None
            if seen is not None and not seen.startswith("127."):
                return seen
    return first


def stale_master(variables: Mapping[str, str], hosts: Sequence[str], facts: Mapping[str, HostFacts]) -> list[Finding]:
    """Report a MASTER_ADDR in the file that is not the first host; Open MPI's ranks would connect to it."""
    address = variables.get("MASTER_ADDR")
    right = {hosts[0]} | {fact.addresses.get(hosts[0]) for fact in facts.values()}
    if address is None or address in right:
        return []
    what = f"{DEEPSPEED_ENV} says MASTER_ADDR={address}, but the first host is {hosts[0]}"
    return [Finding(PROBLEM, ROW, (), what, WRITE)]


def write_variables(path: Path, master: str | None, interface: str | None) -> tuple[list[str], ForwardedVariables]:
    """Generate the file from this shell's variables.

    Args:
        path: of the file; the private one is written beside it where it is needed.
        master: address of rank 0; None for this machine alone.
        interface: for gloo and nccl, where they would find a wrong one; what the shell says counts more.

    Returns: the names handed on, and what ranks will get.

    Raises:
        ConfigError: something cannot be handed on or written.
    """
    environment = dict(os.environ)
    if master is not None:
        environment["MASTER_ADDR"] = master
        environment.setdefault("MASTER_PORT", "29500")
    if interface is not None:
        for name in INTERFACE_NAMES:
            environment.setdefault(name, interface)
    names = write_deepspeed_env(path, path.with_name(PRIVATE_NAME), environment)
    written = read_deepspeed_env(path.parent, {"DS_ENV_FILE": path.name, "HOME": str(path.parent)})
    return names, written
