"""DeepSpeed's launcher: its command line, and the variables that its own process may see."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from stagdist.cluster.hosts.shell_variables import (
    EXPORTED_BY_DEEPSPEED,
    check_early,
    is_early,
    is_plain,
    is_secret,
    may_be_shown,
)
from stagdist.errors import ConfigError


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
