"""The command lines of launchers: how one attempt's agents come to run on every host. Pure, except for names."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.leftovers import JOB_VARIABLE
from stagdist.cluster.hosts.remote import ssh_words
from stagdist.cluster.hosts.shell_variables import (
    EXPORTED_BY_DEEPSPEED,
    check_early,
    is_early,
    is_plain,
    is_secret,
    may_be_shown,
)
from stagdist.errors import ConfigError

Launcher = Literal["local", "pdsh", "openmpi", "torchrun"]

_AGENT = "stagdist.cluster.supervision.agent"


@dataclass(frozen=True)
class Launch:
    """What every launcher needs to know."""

    hosts: tuple[Host, ...]  # in the order of their ranks
    master_address: str  # of the first host, as the others reach it
    master_port: int  # free there
    job: Path  # file for the agents, on a path that all hosts see
    hostfile: Path  # written for the launcher
    environment_file: Path  # for DeepSpeed, instead of `.deepspeed_env`
    mark: str  # of the job's processes
    folder: Path  # working directory
    as_root: bool = False  # the user is root, which Open MPI must allow explicitly

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return sum(host.slots for host in self.hosts)


def commands(launcher: Launcher, launch: Launch) -> list[list[str]]:
    """Argument lists of the processes to start here; together they start one agent per slot."""
    agent = ["--job", str(launch.job)]
    if launcher == "torchrun":
        return [ssh_words(host.name, _torchrun_line(launch, node, agent)) for node, host in enumerate(launch.hosts)]
    words = deepspeed_words(
        launcher, launch.world_size, launch.hostfile, launch.master_address, launch.master_port, launch.as_root
    )
    return [[*words, "--module", _AGENT, *agent]]


def deepspeed_words(
    launcher: str, world_size: int, hostfile: Path, master_address: str, master_port: int, as_root: bool
) -> list[str]:
    """DeepSpeed's launcher with its options; module or script follow.

    Args:
        launcher: `local`, `pdsh` or `openmpi`.
        world_size: ranks on this machine, for `local`.
        hostfile: of the hosts; not used by `local`.
        as_root: the user is root, which Open MPI must allow explicitly.
    """
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(master_port)]
    if launcher == "local":
        # A file that cannot be there: DeepSpeed must not take one that it finds at its usual place.
        return [*words, "--hostfile", "/dev/null/none", "--num_accelerators", str(world_size)]
    words += ["--hostfile", str(hostfile), "--launcher", launcher, "--force_multi", "--master_addr", master_address]
    return [*words, "--launcher_args=--allow-run-as-root"] if launcher == "openmpi" and as_root else words


def _torchrun_line(launch: Launch, node: int, agent: list[str]) -> str:
    words = [
        "env", f"{JOB_VARIABLE}={launch.mark}",
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", str(len(launch.hosts)), "--nproc-per-node", str(launch.hosts[node].slots),
        "--node-rank", str(node), "--max-restarts", "0",
        "--master-addr", launch.master_address, "--master-port", str(launch.master_port),
        "-m", _AGENT, *agent,
    ]  # fmt: skip
    return f"cd -- {shlex.quote(str(launch.folder))} && exec {shlex.join(words)}"


def launcher_environment(launcher: Launcher, launch: Launch, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for the launcher's own process.

    Raises:
        ConfigError: see `for_deepspeed`.
    """
    if launcher in ("pdsh", "openmpi"):
        return for_deepspeed(environment) | {JOB_VARIABLE: launch.mark, "DS_ENV_FILE": str(launch.environment_file)}
    kept = for_deepspeed_here(environment) if launcher == "local" else dict(environment)
    return kept | {JOB_VARIABLE: launch.mark}


def for_deepspeed_here(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables without the secret ones that DeepSpeed would log when it starts ranks on this machine: all of NCCL."""
    return {name: value for name, value in environment.items() if "NCCL" not in name or not is_secret(name, value)}


def for_deepspeed(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables without those that DeepSpeed would put into command lines although they are secret or no plain text.

    Ranks get those by the job's private file. PATH begins with the folder of this Python: mpirun may lie there.

    Raises:
        ConfigError: Python's own, which it needs to start, are among those.
    """
    kept = {}
    for name, value in environment.items():
        unasked = name.startswith(EXPORTED_BY_DEEPSPEED)
        if unasked and is_early(name, value):
            check_early(name, value)
        if not unasked or may_be_shown(name, value):
            kept[name] = value
    return kept | {"PATH": f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}"}


def environment_file(launch: Launch, environment: Mapping[str, str]) -> str:
    """Text of the file that DeepSpeed reads: what must be there before an agent reads its job.

    Raises:
        ConfigError: a variable that Python needs to start is not plain, or holds a password.
    """
    early = {name: value for name, value in environment.items() if is_early(name, value)}
    for name, value in early.items():
        check_early(name, value)
    early |= {JOB_VARIABLE: launch.mark, "MASTER_ADDR": launch.master_address, "MASTER_PORT": str(launch.master_port)}
    if "DS_ACCELERATOR" in environment and may_be_shown("DS_ACCELERATOR", environment["DS_ACCELERATOR"]):
        early["DS_ACCELERATOR"] = environment["DS_ACCELERATOR"]
    return "".join(f"{name}={value}\n" for name, value in early.items())


def check_paths(*paths: str | Path) -> None:
    """DeepSpeed puts paths unquoted into the command line of the hosts.

    Raises:
        ConfigError: one holds a space or a character of shells.
    """
    for path in paths:
        if not is_plain(str(path)):
            raise ConfigError(
                f"{str(path)!r} holds characters that a shell on the hosts could run or split; move it to a path with "
                "letters, digits and ./_- alone"
            )


def reachable_address(host: str) -> str:
    """The address of this machine that `host` would answer to.

    Raises:
        ConfigError: the name cannot be resolved, or no route leads there.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: only the route is looked up
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"host {host} has no address that can be reached from here: {error}") from error


def address_of(hosts: tuple[Host, ...]) -> str:
    """Address of the first host as the others reach it, also where its own name means loopback there.

    Raises:
        ConfigError: it has none.
    """
    first = hosts[0].name
    try:
        address = str(socket.getaddrinfo(first, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"host {first} has no address: {error}; fix the hostfile or the name service") from error
    if address.startswith("127.") or address == "::1":
        # Debian maps a host's own name to 127.0.1.1, so we are on it.
        return address if len(hosts) == 1 else reachable_address(hosts[1].name)
    return address
