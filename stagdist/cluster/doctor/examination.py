"""The complete examination: hosts, variables, links, report."""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from stagdist.cluster.doctor.facts import ALONE, PROBLEM, ROOT, Finding, HostFacts, LinkReport, Survey
from stagdist.cluster.doctor.findings import findings
from stagdist.cluster.doctor.host_probe import PREFIX, existing
from stagdist.cluster.doctor.link_probe import ERROR_PREFIX
from stagdist.cluster.doctor.report import report
from stagdist.cluster.doctor.variables import (
    INTERFACE_NAMES,
    common_route,
    master_address,
    read_deepspeed_env,
    stale_master,
    write_variables,
)
from stagdist.cluster.hosts.hostfile import Host, Hostfile, read_hostfile
from stagdist.cluster.hosts.remote import SSH_FAILED, Finished, on_all, remote_command, run_here, run_on
from stagdist.cluster.hosts.shell_variables import may_be_shown, rank_variables
from stagdist.config.loading import load_config
from stagdist.errors import ConfigError, TransportError
from stagdist.parallel.grid import Grid, grid_for
from stagdist.parallel.lost_peer_phrases import peer_closed

HOST_PROBE = "stagdist.cluster.doctor.host_probe"
LINK_PROBE = "stagdist.cluster.doctor.link_probe"
EXAMINE_S = 90.0
"""Seconds for the report of one host; writing the test file takes most of it."""

CLOCK_S = 15.0
GRACE_S = 5.0
"""Seconds in which a command ends whose time is up."""

START_SHARE = 0.6
"""Share of the time limit in which all ranks must start: hosts may load Python from one slow disk."""

TIME_UP = (None, 124, 137)
"""Exit codes of a command whose time was up, here or by `timeout` on its host."""

LONGEST_NAME = 255
"""Bytes of the name of a file on Linux."""


@dataclass(frozen=True)
class DoctorOptions:
    """What to examine."""

    hostfile: Path | None = None  # hosts; None for this machine alone
    num_ranks: int = 2  # on this machine alone
    config: Path | None = None  # configuration of the run: its grid and its folder
    overrides: Sequence[str] = ()  # of the configuration, KEY=VALUE
    checkpoints: Path | None = None  # folder of the checkpoints; None for the configuration's, else `runs`
    write_mib: int = 64  # size of the file that measures the disk, in MiB
    json: Path | None = None  # where to write everything
    write_env: Path | None = None  # where to write the variables of the ranks
    time_limit_s: int = 150  # for measuring the links


def examine(options: DoctorOptions) -> int:
    """Examine, print the report to standard output. Returns: 0 fine, 1 problems.

    Raises:
        ConfigError: hostfile, configuration, a variable or a file cannot be used.
    """
    known = read_hostfile(options.hostfile) if options.hostfile else Hostfile((Host(ALONE, options.num_ranks),))
    grid, checkpoints = _layout(options, known.hosts)
    for name, path in (("--json", options.json), ("--write-env", options.write_env)):
        if path is not None and not os.path.isdir(path.absolute().parent):
            raise ConfigError(f"{name} {path}: there is no folder {path.parent}; make it first")
        if path is not None and (os.path.isdir(path) or len(os.fsencode(path.name)) > LONGEST_NAME):
            raise ConfigError(f"{name} {path} is a folder, or its name is too long; name a file")
    slots = {host.name: host.slots for host in (*known.hosts, *known.spares)}
    whom = next(iter(slots)) if len(slots) == 1 else f"{len(slots)} hosts"
    _say(f"asking {whom}, writing {options.write_mib} MiB to {checkpoints}")
    survey = ask_all(slots, checkpoints.absolute(), options.write_mib)
    variables, environment = _variables(options, known.hosts, survey.facts)
    survey = survey.model_copy(update={"interface": variables.get(INTERFACE_NAMES[0]), "environment": environment})
    try:
        links = measure_links(known.hosts, grid, survey.facts, variables, options.time_limit_s)
        survey = survey.model_copy(update={"links": links})
    except TransportError as error:
        survey = survey.model_copy(update={"links_problem": str(error)})
    found = findings(survey)
    print(report(survey, found), end="", flush=True)
    code = int(any(finding.level == PROBLEM for finding in found))
    if options.json is not None:
        _write(options.json, survey, found, code)
    return code


def _layout(options: DoctorOptions, hosts: Sequence[Host]) -> tuple[Grid, Path]:
    """The grid of the ranks and the folder of the checkpoints. Without a configuration every host is a stage."""
    slots = [host.slots for host in hosts]
    grid, folder = Grid(sum(slots), 1, 1), Path("runs")
    if options.config is not None:
        config = load_config(str(options.config), list(options.overrides))
        grid, folder = grid_for(config, sum(slots)), Path(config.folder)
    elif options.hostfile and len(set(slots)) == 1:
        grid = Grid(len(hosts), slots[0], 1)
    return grid, options.checkpoints or folder


def _variables(
    options: DoctorOptions, hosts: Sequence[Host], facts: Mapping[str, HostFacts]
) -> tuple[dict[str, str], tuple[Finding, ...]]:
    """What ranks get of this shell and of `.deepspeed_env`, which is written on request; what is wrong with it."""
    names = [host.name for host in hosts]
    variables: dict[str, str] = {}
    found: list[Finding] = []
    shell = {name: value for name, value in rank_variables(os.environ).items() if may_be_shown(name, value)}
    several = options.hostfile is not None
    if path := options.write_env:
        lost = several and any(fact.own_interface in (None, "lo") for fact in facts.values())
        interface = common_route(facts.values()) if lost else None
        written = write_variables(path, master_address(names, facts) if several else None, interface)
        _say(f"{path} hands on {', '.join(written)}")
        variables, found = read_deepspeed_env(path.parent, {"DS_ENV_FILE": path.name, "HOME": str(path.parent)})
    elif several:
        variables, found = read_deepspeed_env(Path.cwd())
        found += stale_master(variables, names, facts)
    return shell | variables, tuple(found)


def _write(path: Path, survey: Survey, found: Sequence[Finding], code: int) -> None:
    body = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "doctor_host": platform.node(),
        "python": sys.executable,
        **survey.model_dump(exclude={"environment"}),
        "findings": [asdict(finding) for finding in found],
        "exit_code": code,
    }
    try:
        path.write_text(json.dumps(body, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror or error}") from error


def _say(text: str) -> None:
    print(f"doctor: {text}", file=sys.stderr, flush=True)


# --- hosts ------------------------------------------------------------------------------------------------------------


def run(host: str, words: Sequence[str], limit_s: float, stdin: str = "", **variables: str) -> Finished:
    """Run a command in the folder of the code on a host, or here for `ALONE`, for at most `limit_s` seconds."""
    if host == ALONE:
        line = remote_command(words, limit_s, ROOT, variables)
        return run_here(["sh", "-c", line], limit_s + GRACE_S, stdin=stdin)
    return run_on(host, words, limit_s, folder=ROOT, environment=variables, stdin=stdin)


def ask_all(slots: dict[str, int], checkpoints: Path, write_mib: int) -> Survey:
    """Examine all hosts.

    Args:
        slots: ranks by host, in the order of the ranks.
        checkpoints: absolute path of the folder to try.
        write_mib: size of the file to measure the disk with, in MiB.
    """
    request = {"hosts": list(slots), "folder": str(Path.cwd()), "checkpoints": str(checkpoints), "size_mib": write_mib}

    def ask(host: str, mark: str) -> HostFacts | TransportError:
        try:
            return ask_host(host, request | {"mark": mark})
        except TransportError as error:
            return error

    with contextlib.ExitStack() as stack:
        mark = str(checkpoints / PREFIX)
        with contextlib.suppress(OSError):  # hosts that cannot write there either say why; the others do not see it
            mark = stack.enter_context(TemporaryDirectory(prefix=PREFIX, dir=existing(checkpoints)))
        answers = on_all(slots, lambda host: ask(host, mark))
    facts = {host: answer for host, answer in answers.items() if isinstance(answer, HostFacts)}
    silent = {host: str(answer) for host, answer in answers.items() if host not in facts}
    return Survey(hosts=tuple(slots), slots=slots, facts=facts, silent=silent)


def ask_host(host: str, request: Mapping[str, object]) -> HostFacts:
    """The answer of a host, with its clock.

    Raises:
        TransportError: there is none; says why and what helps.
    """
    sent = time.time()
    clock = run(host, ["date", "+%s.%N"], CLOCK_S)
    words, stdin = [sys.executable, "-m", HOST_PROBE], json.dumps({**request, "host": host})
    done = run(host, words, EXAMINE_S, stdin) if clock.ok else clock
    if not done.ok or not done.stdout:
        raise TransportError(_why_silent(host, done))
    # A login script may print lines before the answer.
    facts = HostFacts.model_validate_json(done.stdout.splitlines()[-1])
    error_s = clock.wall_s / 2
    offset_s = float(clock.stdout.split()[-1]) - (sent + error_s)
    return facts.model_copy(update={"clock_offset_s": offset_s, "clock_error_s": error_s})


def _why_silent(host: str, done: Finished) -> str:
    if done.code == SSH_FAILED or (done.code is None and not done.stderr):
        return (
            f"does not answer ssh ({done.reason}); try `ssh {host} true`: it must work without a question, then look "
            "at power, network and keys"
        )
    if "ModuleNotFoundError" in done.reason:
        return f"lacks a package ({done.reason}); install it there: pip install -c constraints.txt -e ."
    if done.code in (1, 2, 127) and ("cd:" in done.stderr or "failed to run command" in done.stderr):
        return (
            f"cannot start Python ({done.reason}); put code and environment at the same paths on every host: {ROOT} "
            f"and {sys.executable}"
        )
    return f"its examination failed ({done.reason}); run `{sys.executable} -m {HOST_PROBE}` there"


# --- links between ranks ----------------------------------------------------------------------------------------------


def measure_links(
    hosts: Sequence[Host], grid: Grid, facts: Mapping[str, HostFacts], variables: Mapping[str, str], limit_s: int
) -> LinkReport | None:
    """Start the ranks on all hosts and bring back what they measured; None for a single rank.

    Args:
        hosts: in the order of their ranks.
        grid: of all ranks.
        facts: of the hosts that answered.
        variables: for the ranks; visible in process lists.
        limit_s: seconds that it may take.

    Raises:
        TransportError: they did not get there; says what the first of them said.
    """
    names = [host.name for host in hosts]
    if silent := [name for name in names if name not in facts]:
        raise TransportError(f"{', '.join(silent)} did not answer")
    if grid.world_size == 1:
        return None
    _say(f"measuring links between {grid.world_size} ranks ({grid})")
    address = "127.0.0.1" if names == [ALONE] else master_address(names, facts)
    variables = {**variables, "MASTER_ADDR": address, "MASTER_PORT": str(facts[names[0]].port)}
    words = [sys.executable, "-m", LINK_PROBE, "--start-s", f"{START_SHARE * limit_s:g}"]
    words += ["--grid", *(str(size) for size in (grid.pipe, grid.data, grid.tensor))]

    def start(name: str) -> Finished:
        index = names.index(name)
        first = sum(host.slots for host in hosts[:index])
        own = ["--first-rank", str(first), "--ranks", str(hosts[index].slots)]
        return run(name, [*words, *own], limit_s, **variables)

    return read_links(on_all(names, start, at_once=len(names)))


def read_links(ended: Mapping[str, Finished]) -> LinkReport:
    """The result among everything that the ranks of all hosts wrote.

    Raises:
        TransportError: it is not there.
    """
    results = [line for done in ended.values() for line in done.stdout.splitlines() if line.startswith('{"grid":')]
    if results and all(done.ok for done in ended.values()):
        return LinkReport.model_validate_json(results[0])
    lines = [line for done in ended.values() for line in done.stderr.splitlines()]
    if errors := [line for line in lines if line.startswith(ERROR_PREFIX)]:
        raise TransportError(f"{len(errors)} ranks failed, the first: {sorted(errors, key=peer_closed)[0]}")
    for host, done in ended.items():
        if not done.ok and done.code not in TIME_UP:
            raise TransportError(f"ranks on {host} failed: {done.reason}")
    raise TransportError("the ranks did not end within the time limit; a network that swallows packets, or too short")
