"""The variables that ranks get: what DeepSpeed would hand on from `.deepspeed_env`, and what the file should contain.

Runs under the supervisor do not need the file.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
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

_LINE = re.compile(r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>.*?)\s*")


def read_deepspeed_env(
    folder: Path, environment: Mapping[str, str] = os.environ
) -> tuple[dict[str, str], list[Finding]]:
    """Read the files that DeepSpeed reads when it is started in `folder`: the one at home, then the one there.

    Returns: the variables that are safe to hand on, and what is wrong with the others, or with there being no file.
    """
    name = environment.get("DS_ENV_FILE", DEEPSPEED_ENV)
    paths = dict.fromkeys(place / name for place in (Path(environment.get("HOME", "/")), folder))
    variables: dict[str, str] = {}
    found: list[Finding] = []
    read = [path for path in paths if path.is_file()]
    for path in read:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            match = _LINE.fullmatch(line)
            if problem := _problem(match):
                found.append(_finding(PROBLEM, f"{path}, line {number}: {problem}"))
            elif match:
                variables[match["name"]] = match["value"]
    shell = rank_variables(environment)
    left = [one for one in shell if one.startswith(PREFIXES) or is_credential(one)]
    if not read and (left := [one for one in left if not one.startswith(EXPORTED_BY_DEEPSPEED)]):
        what = f"there is no {DEEPSPEED_ENV}: started by `deepspeed`, ranks on other hosts will not see"
        found.append(_finding(NOTE, f"{what} {', '.join(left)}"))
    exported = [one for one in shell if one.startswith(EXPORTED_BY_DEEPSPEED) and one not in variables]
    if shown := [one for one in exported if not may_be_shown(one, shell[one])]:
        what = "DeepSpeed by itself writes what is secret or a shell could run into the command lines of all hosts:"
        found.append(_finding(NOTE, f"{what} {', '.join(shown)}"))
    return variables, found


def _problem(match: re.Match[str] | None) -> str:
    if match is None:
        return "not NAME=VALUE, and DeepSpeed would fail on it"
    if not is_plain(match["value"]):
        return f"{match['name']} holds characters that a shell on the hosts would split or run"
    if is_secret(match["name"], match["value"]):
        return f"{match['name']} would be visible in the process lists of all hosts"
    return ""


def _finding(level: str, what: str) -> Finding:
    return Finding(level, "environment", (), what, "write it with launch/doctor.py --write-env")


def common_route(facts: Iterable[HostFacts]) -> str | None:
    """The interface towards the other hosts, where it has the same name everywhere."""
    routes = {fact.route for fact in facts}
    return routes.pop() if len(routes) == 1 else None


def master_address(hosts: Sequence[str], facts: Mapping[str, HostFacts]) -> str:
    """What ranks call the first host: its name, or its address where the name means something else to itself."""
    first = hosts[0]
    seen = [facts[host].addresses.get(first) or "127." for host in hosts if host in facts]
    if seen and first in facts and (facts[first].addresses.get(first) or "").startswith("127."):
        return next((address for address in seen if not address.startswith("127.")), first)
    return first


def stale_master(variables: Mapping[str, str], hosts: Sequence[str], facts: Mapping[str, HostFacts]) -> list[Finding]:
    """Report a MASTER_ADDR in the file that is not the first host; Open MPI's ranks would connect to it."""
    address = variables.get("MASTER_ADDR")
    right = {hosts[0]} | {fact.addresses.get(hosts[0]) for fact in facts.values()}
    if address is None or address in right:
        return []
    return [_finding(PROBLEM, f"{DEEPSPEED_ENV} says MASTER_ADDR={address}, but the first host is {hosts[0]}")]


def write_variables(path: Path, master: str | None, interface: str | None) -> list[str]:
    """Generate the file from this shell's variables.

    Args:
        path: of the file; the private one is written beside it where it is needed.
        master: address of rank 0; None for this machine alone.
        interface: for gloo and nccl, where they would find a wrong one; variables of the shell take precedence.

    Returns: the names handed on.

    Raises:
        ConfigError: something cannot be handed on or written.
    """
    environment = dict(os.environ)
    if master is not None:
        environment["MASTER_ADDR"] = master
        environment.setdefault("MASTER_PORT", "29500")
    if interface is not None:
        environment = dict.fromkeys(INTERFACE_NAMES, interface) | environment
    return write_deepspeed_env(path, path.with_name(PRIVATE_NAME), environment)
