"""Entry points of `launch/` started on the hosts of a lab, by every launcher, as people type it."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.shell_variables import DEEPSPEED_ENV, write_deepspeed_env
from tests.lab.hosts import Lab
from tests.lab.inside import Call
from tests.launch.runs import PRETRAIN, tiny_config, write_config
from tests.ranks import free_port

BIN = Path(sys.executable).parent
whole_matrix = pytest.mark.skipif(os.environ.get("LAB") != "all", reason="LAB=all runs every launcher on every grid")
LAUNCHERS = ("pdsh", "openmpi", "no_ssh", "torchrun")
VARIABLES = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}
"""What a person would have set in the shell; it reaches the ranks by the generated file or not at all."""


@dataclass(frozen=True)
class GridCase:
    """Two hosts of so many slots, and how the ranks are used; what is left over is data parallel."""

    slots: int
    tensor: int = 1


GRIDS = {"pipe2": GridCase(1), "pipe2_data2": GridCase(2), "pipe2_tensor2": GridCase(2, tensor=2)}


def run_config(corpus: Path, grid: str, steps: int = 4) -> dict[str, Any]:
    """A run called `run` of a few steps on bytes, two sections."""
    return tiny_config(
        corpus,
        "run",
        training={"steps": steps, "global_batch_size": 8, "micro_batch_size": 2},
        parallel={"timeout_s": 60, "tensor_parallel_size": GRIDS[grid].tensor},
    )


def hostfile_text(hosts: Iterable[Host]) -> str:
    """The hosts as DeepSpeed, Open MPI and the supervisor read them."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def pretrain(lab: Lab, launcher: str, folder: Path, corpus: Path, grid: str) -> list[Call]:
    """Start the run of a grid over two hosts."""
    config = write_config(folder, run_config(corpus, grid))
    return start(lab, launcher, folder, [str(PRETRAIN), "--config", str(config)], slots=GRIDS[grid].slots)


def start(
    lab: Lab,
    launcher: str,
    folder: Path,
    script: Sequence[str],
    *,
    slots: int = 1,
    hosts: Sequence[str] = ("node1", "node2"),
    variables: Mapping[str, str] = VARIABLES,
) -> list[Call]:
    """Start `script` (path and arguments) in `folder` on several hosts; one call per command that a person types.

    The first call is that of the first host.
    """
    port = str(free_port())
    master = lab.address(hosts[0])
    environment = {**variables, "MASTER_ADDR": master, "MASTER_PORT": port}
    write_deepspeed_env(folder / DEEPSPEED_ENV, folder / "private.env", environment)
    (folder / "hostfile").write_text(hostfile_text(Host(host, slots) for host in hosts))
    shell = {**variables, "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}
    return [
        lab.popen(host, [*command, *script], env=shell, cwd=folder)
        for host, command in _commands(launcher, hosts, slots, master, port).items()
    ]


def _commands(launcher: str, hosts: Sequence[str], slots: int, master: str, port: str) -> dict[str, list[str]]:
    """What is typed on which host."""
    deepspeed = ["deepspeed", "--hostfile", "hostfile", "--master_addr", master, "--master_port", port]
    first = hosts[0]
    if launcher == "pdsh":
        return {first: deepspeed}
    if launcher == "openmpi":
        return {first: [*deepspeed, "--launcher", "openmpi", "--launcher_args=--allow-run-as-root"]}
    if launcher == "no_ssh":
        return {host: [*deepspeed, "--no_ssh", "--node_rank", str(number)] for number, host in enumerate(hosts)}
    assert launcher == "torchrun", launcher
    torchrun = ["torchrun", "--nnodes", str(len(hosts)), "--nproc-per-node", str(slots), "--master-addr", master]
    return {host: [*torchrun, "--master-port", port, "--node-rank", str(number)] for number, host in enumerate(hosts)}


def finish(calls: Sequence[Call], timeout_s: float = 120) -> str:
    """Wait until all calls have ended well; everything they printed.

    Raises:
        AssertionError: one failed, or still runs; with what it printed.
    """
    for call in calls:
        code = call.wait(timeout_s)
        assert code == 0, f"{call.what}: exit code {code}\n{call.text()}"
    return "".join(call.text() for call in calls)
