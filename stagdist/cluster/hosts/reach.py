"""How a program is started on a host so that its pipes lead here: as a child, over ssh, or by Slurm's srun."""

import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.leftovers import JOB_VARIABLE
from stagdist.cluster.hosts.remote import remote_command, run_on, ssh_words
from stagdist.cluster.hosts.shell_variables import is_early, rank_variables, refuse_password
from stagdist.errors import ConfigError

StartWay = Literal["ssh", "srun"]

SRUN = (
    "srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--overlap", "--unbuffered", "--export=ALL",
    "--kill-on-bad-exit=0",
)  # fmt: skip
"""One step with one task, which shares the node with other steps of the allocation."""

SRUN_READS = frozenset(
    {"SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_LABELIO", "SLURM_NTASKS_PER_NODE",
     "SLURM_TRES_PER_TASK", "SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU"}
)  # fmt: skip
"""Variables of a batch script that srun takes for options. They would limit the task to the share of one rank."""


@dataclass(frozen=True)
class StartCommand:
    """A process to start here, whose pipes are those of a program on the host."""

    words: tuple[str, ...]  # program and arguments
    environment: Mapping[str, str]  # all its variables
    folder: Path | None = None  # working directory here; None: that of this process


def start_command(
    host: str, way: StartWay, words: tuple[str, ...], folder: Path, mark: str, silence_s: float
) -> StartCommand:
    """How to start a program on a host. It runs as a child of this process if the host is this machine.

    Args:
        host: its name.
        way: for other machines.
        words: program and arguments.
        folder: working directory on the host.
        mark: value of `JOB_VARIABLE`.
        silence_s: seconds after which a link without any answer is closed.

    Raises:
        ConfigError: a variable that Python needs to start holds a password.
    """
    if is_this_machine(host):
        return StartCommand(words, os.environ | {JOB_VARIABLE: mark}, folder)
    # In the command: a variable of srun's own process would mark it as a process of the run.
    if way == "srun":
        place = (*SRUN, f"--nodelist={host}", f"--chdir={folder}", "env", f"{JOB_VARIABLE}={mark}")
        return StartCommand((*place, *words), {name: os.environ[name] for name in os.environ.keys() - SRUN_READS})
    line = remote_command(words, None, folder, early_variables(os.environ) | {JOB_VARIABLE: mark})
    return StartCommand(tuple(ssh_words(host, line, silence_s=silence_s)), dict(os.environ))


def early_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that Python needs to start, which ssh must put on a command line.

    Raises:
        ConfigError: one holds a password.
    """
    early = {name: value for name, value in rank_variables(environment).items() if is_early(name, value)}
    for name, value in early.items():
        refuse_password(name, value)
    return early


def choose_way(asked: StartWay | None, hosts: tuple[Host, ...]) -> StartWay:
    """What starts the agents of other machines: ssh, or srun where it is requested or ssh does not work.

    Raises:
        ConfigError: srun is requested outside a Slurm allocation, or is not installed.
    """
    others = [host.name for host in hosts if not is_this_machine(host.name)]
    in_allocation = "SLURM_JOB_ID" in os.environ and shutil.which("srun") is not None
    if asked == "srun" and not in_allocation:
        raise ConfigError(
            "--start-with srun needs a Slurm allocation and srun on PATH: SLURM_JOB_ID is "
            f"{os.environ.get('SLURM_JOB_ID', 'not set')}; start it by sbatch or salloc, or use --start-with ssh"
        )
    if asked is None and in_allocation and others:
        works = shutil.which("ssh") is not None and run_on(others[0], ["true"], 5.0).ok
        return "ssh" if works else "srun"
    return asked or "ssh"


def is_this_machine(host: str) -> bool:
    """Whether a host name means this machine: its own name, or an address of one of its interfaces."""
    own = socket.gethostname()
    if host in ("localhost", own, own.partition(".")[0]):
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return not is_loopback(str(address[0]))


def is_loopback(address: str) -> bool:
    """Whether an address leads nowhere else."""
    return address.startswith("127.") or address == "::1"


def address_of(hosts: tuple[Host, ...]) -> str:
    """Address of the first host as the others reach it, also where its own name means loopback there.

    Raises:
        ConfigError: it has none.
    """
    first = hosts[0].name
    address = _route(first)[0]
    if is_loopback(address) and len(hosts) > 1:
        return _route(hosts[1].name)[1]  # Debian maps a host's own name to 127.0.1.1, so we are on it
    return address


def _route(host: str) -> tuple[str, str]:
    """Address of a host, and that of this machine on the route to it.

    Raises:
        ConfigError: the name cannot be resolved, or no route leads there.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: only the route is looked up
            return str(target[0]), str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"host {host} has no address that can be reached from here: {error}; fix the hostfile or the name service"
        ) from error
