"""The complete examination: hosts, then links, then the report."""

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagdist.cluster.doctor.facts import PROBLEM, Finding, Links, Survey
from stagdist.cluster.doctor.findings import findings
from stagdist.cluster.doctor.host_probe import free_port
from stagdist.cluster.doctor.report import report
from stagdist.cluster.doctor.run_probes import HostAccess, LinkPlan, ask_all, measure_links
from stagdist.cluster.doctor.variables import (
    INTERFACE_NAMES,
    ForwardedVariables,
    common_route,
    master_address,
    needs_interface,
    read_deepspeed_env,
    stale_master,
    write_variables,
)
from stagdist.cluster.hosts.hostfile import Host, Hostfile, read_hostfile
from stagdist.config.loading import load_config
from stagdist.errors import ConfigError, TransportError
from stagdist.parallel.grid import Grid, grid_for

ALONE = "localhost"


@dataclass(frozen=True)
class DoctorOptions:
    """What to examine."""

    hostfile: Path | None = None  # hosts; None for this machine alone
    num_ranks: int = 2  # on this machine alone
    launcher: str = "pdsh"  # see `linking.LAUNCHERS`
    config: Path | None = None  # configuration of the run: its grid and its folder
    overrides: Sequence[str] = ()  # of the configuration, KEY=VALUE
    checkpoints: Path | None = None  # folder of the checkpoints; None for the configuration's, else `runs`
    write_mib: int = 64  # size of the file that measures the disk, in MiB
    json: Path | None = None  # where to write everything
    write_env: Path | None = None  # where to write the variables of the ranks
    time_limit_s: int = 150  # for measuring the links


LONGEST_NAME = 255
"""Bytes of the name of a file on Linux."""


def examine(options: DoctorOptions) -> int:
    """Examine, print the report to standard output. Returns: 0 fine, 1 problems.

    Raises:
        ConfigError: hostfile, configuration, a variable or a file cannot be used.
    """
    known = read_hostfile(options.hostfile) if options.hostfile else Hostfile(())
    hosts, spares = known.hosts, known.spares
    grid, checkpoints = _layout(options, hosts)
    for name, path in (("--json", options.json), ("--write-env", options.write_env)):
        if path is not None and not os.path.isdir(path.absolute().parent):
            raise ConfigError(f"{name} {path}: there is no folder {path.parent}; make it first")
        if path is not None and (os.path.isdir(path) or len(os.fsencode(path.name)) > LONGEST_NAME):
            raise ConfigError(f"{name} {path} is a folder, or its name is too long; name a file")
    slots = {host.name: host.slots for host in (*hosts, *spares)} or {ALONE: grid.world_size}
    whom = next(iter(slots)) if len(slots) == 1 else f"{len(slots)} hosts"
    _say(f"asking {whom}, writing {options.write_mib} MiB to {checkpoints}")
    survey = ask_all(slots, HostAccess(alone=not hosts), Path.cwd(), checkpoints, options.write_mib)
    survey, handed = _variables(options, hosts, survey)
    survey = _links(options, hosts, grid, survey, handed)
    found = findings(survey)
    print(report(survey, found), end="", flush=True)
    code = int(any(finding.level == PROBLEM for finding in found))
    if options.json is not None:
        _write(options.json, options, survey, found, code)
    return code


def _layout(options: DoctorOptions, hosts: Sequence[Host]) -> tuple[Grid, Path]:
    """The grid of the ranks and the folder of the checkpoints. Without a configuration every host is a stage."""
    world_size = sum(host.slots for host in hosts) or options.num_ranks
    folder = Path("runs")
    if options.config is not None:
        config = load_config(str(options.config), list(options.overrides))
        folder = Path(config.folder)
        grid = grid_for(config, world_size)
    elif hosts and len({host.slots for host in hosts}) == 1:
        grid = Grid(len(hosts), hosts[0].slots, 1)
    else:
        grid = Grid(world_size, 1, 1)
    return grid, options.checkpoints or folder


def _variables(options: DoctorOptions, hosts: Sequence[Host], survey: Survey) -> tuple[Survey, ForwardedVariables]:
    """What ranks will get; writes them to a file on request."""
    facts = survey.facts.values()
    names = [host.name for host in hosts]
    route = common_route(facts) if hosts and needs_interface(facts) else None
    if options.write_env is None:
        handed = read_deepspeed_env(Path.cwd()) if hosts else ForwardedVariables(_interfaces_of_this_shell())
        fixed = False
    else:
        master = master_address(names, survey.facts) if hosts else None
        written, handed = write_variables(options.write_env, master, route)
        _say(f"{options.write_env} hands on {', '.join(written)}")
        fixed = route is not None
    interface = handed.variables.get(INTERFACE_NAMES[0])
    other = (*handed.findings, *(stale_master(handed.variables, names, survey.facts) if hosts else ()))
    return dataclasses.replace(survey, interface=interface, fixed=fixed, other=other), handed


def _interfaces_of_this_shell() -> dict[str, str]:
    return {name: os.environ[name] for name in INTERFACE_NAMES if name in os.environ}


def _links(
    options: DoctorOptions, hosts: Sequence[Host], grid: Grid, survey: Survey, handed: ForwardedVariables
) -> Survey:
    working = [host.name for host in hosts] or [ALONE]
    silent = [name for name in working if name not in survey.facts]
    if silent:
        return dataclasses.replace(survey, links_problem=f"{', '.join(silent)} did not answer")
    if grid.world_size < 2:
        return survey
    variables = dict(handed.variables)
    route = common_route(survey.facts.values())
    if hosts and needs_interface(survey.facts.values()) and survey.interface is None and route:
        _say(f"a host takes its own name for itself: measuring with GLOO_SOCKET_IFNAME={route}")
        variables |= dict.fromkeys(INTERFACE_NAMES, route)
    first = survey.facts[working[0]]
    plan = LinkPlan(
        grid=grid,
        hosts=tuple(hosts),
        launcher=options.launcher,
        master=master_address(working, survey.facts) if hosts else "127.0.0.1",
        port=first.free_port if hosts else free_port(),
        variables=variables,
        limit_s=options.time_limit_s,
    )
    _say(f"measuring links between {grid.world_size} ranks ({grid})")
    try:
        return dataclasses.replace(survey, links=measure_links(plan))
    except TransportError as error:
        return dataclasses.replace(survey, links_problem=str(error))


def _write(path: Path, options: DoctorOptions, survey: Survey, found: Sequence[Finding], code: int) -> None:
    links: Links | None = survey.links
    body = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "doctor_host": platform.node(),
        "python": sys.executable,
        "launcher": options.launcher if options.hostfile else "local",
        "hosts": list(survey.hosts),
        "slots": survey.slots,
        "facts": {host: dataclasses.asdict(fact) for host, fact in survey.facts.items()},
        "silent": survey.silent,
        "clocks": {host: dataclasses.asdict(clock) for host, clock in survey.clocks.items()},
        "seen": survey.seen,
        "interface": survey.interface,
        "links": links and dataclasses.asdict(links),
        "findings": [dataclasses.asdict(finding) for finding in found],
        "exit_code": code,
    }
    try:
        path.write_text(json.dumps(body, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror or error}") from error


def _say(text: str) -> None:
    print(f"doctor: {text}", file=sys.stderr, flush=True)
