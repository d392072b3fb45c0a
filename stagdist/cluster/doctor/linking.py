"""Starts the link probe on all ranks through a launcher, and reads what they say."""

import base64
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagdist.cluster.doctor import link_probe
from stagdist.cluster.doctor.asking import ROOT
from stagdist.cluster.doctor.facts import Links
from stagdist.cluster.hosts import start as launchers
from stagdist.cluster.hosts.hostfile import Host, hostfile_text
from stagdist.cluster.hosts.remote import Finished, on_all, run_here, run_on
from stagdist.cluster.hosts.shell_variables import write_private
from stagdist.errors import TransportError
from stagdist.parallel.grid import Grid
from stagdist.parallel.lost_peer_phrases import peer_closed

LAUNCHERS = ("pdsh", "openmpi", "torchrun")
PROBE = "stagdist.cluster.doctor.link_probe"
GRACE_S = 30.0
"""Seconds that launcher and Python need around the probe's own limit."""

_PIECE = re.compile(rf"{link_probe.MARK} (\d+)/(\d+) ([A-Za-z0-9+/=]+) END")
_ERROR = re.compile(rf"{link_probe.ERROR_MARK} (rank .*?) END")
_ALARM = re.compile(rf"return code = -{signal.SIGALRM:d}\b|[Ss]ignal {signal.SIGALRM:d}\b")
"""What launchers say of a rank that its own time limit ended."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        grid: of all ranks.
        hosts: in the order of their ranks; empty for this machine alone.
        launcher: one of LAUNCHERS; without hosts DeepSpeed's local one is used.
        master: address of rank 0.
        port: of rank 0.
        variables: for the ranks; no secrets, plain.
        largest_mib: size of the large messages, in MiB.
        step_s: limit of each step.
        limit_s: limit of all.
    """

    grid: Grid
    hosts: tuple[Host, ...]
    launcher: str
    master: str
    port: int
    variables: Mapping[str, str]
    largest_mib: int = 16
    step_s: float = 30.0
    limit_s: int = 150


def measure_links(plan: Plan) -> Links:
    """Run the ranks and bring back what they measured.

    Raises:
        ConfigError: a path or variable cannot be given to a launcher.
        TransportError: they did not get there; says what the first of them said.
    """
    launchers.check_paths(ROOT, sys.executable)
    with tempfile.TemporaryDirectory(prefix="stagdist-doctor-") as name:
        if plan.launcher == "torchrun" and plan.hosts:
            outputs = _torchrun(plan)
        else:
            outputs = [_deepspeed(plan, Path(name))]
    return read_output("\n".join(one.stdout + one.stderr for one in outputs), outputs)


def probe_words(plan: Plan) -> list[str]:
    """Module and arguments of the probe."""
    grid = [str(size) for size in (plan.grid.pipe, plan.grid.data, plan.grid.tensor)]
    limits = ["--largest-mib", str(plan.largest_mib), "--timeout-s", f"{plan.step_s:g}", "--limit-s", str(plan.limit_s)]
    return [PROBE, "--grid", *grid, *limits]


def deepspeed_words(plan: Plan, hostfile: Path) -> list[str]:
    """DeepSpeed's command line."""
    launcher = plan.launcher if plan.hosts else "local"
    words = launchers.deepspeed_words(
        launcher, plan.grid.world_size, hostfile, plan.master, plan.port, os.geteuid() == 0
    )
    return [*words, "--module", "--no_local_rank", *probe_words(plan)]


def _deepspeed(plan: Plan, scratch: Path) -> Finished:
    hostfile = scratch / "hostfile"
    environment = (launchers.for_deepspeed if plan.hosts else launchers.for_deepspeed_here)(os.environ)
    variables = dict(plan.variables)
    if plan.hosts:
        hostfile.write_text(hostfile_text(plan.hosts))
        variables |= {"MASTER_ADDR": plan.master, "MASTER_PORT": str(plan.port)}
    exported = scratch / "deepspeed_env"
    write_private(exported, "".join(f"{name}={value}\n" for name, value in variables.items()))
    own = environment | {"DS_ENV_FILE": str(exported)}
    return run_here(deepspeed_words(plan, hostfile), plan.limit_s + GRACE_S, folder=ROOT, only=own)


def _torchrun(plan: Plan) -> list[Finished]:
    def start(host: str) -> Finished:
        number = next(index for index, one in enumerate(plan.hosts) if one.name == host)
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(plan.hosts))]
        words += ["--node-rank", str(number), "--nproc-per-node", str(plan.hosts[number].slots)]
        words += ["--master-addr", plan.master, "--master-port", str(plan.port), "-m", *probe_words(plan)]
        return run_on(host, words, plan.limit_s + GRACE_S, folder=ROOT, environment=plan.variables)

    return list(on_all([host.name for host in plan.hosts], start, at_once=len(plan.hosts)).values())


def read_output(text: str, outputs: Sequence[Finished]) -> Links:
    """The result among everything that launcher and ranks wrote.

    Raises:
        TransportError: it is not there.
    """
    found = _PIECE.findall(text)
    parts = {int(index): part for index, _, part in found}
    if found and sorted(parts) == list(range(int(found[0][1]))):
        return Links.from_json(json.loads(base64.b64decode("".join(parts[index] for index in sorted(parts)))))
    errors = _ERROR.findall(text)
    if errors:
        first = sorted(errors, key=peer_closed)[0]
        raise TransportError(f"{len(errors)} ranks failed, the first: {first}")
    if any(one.code is None for one in outputs) or _ALARM.search(text):
        raise TransportError(
            "the ranks did not end within the time limit; a network that swallows packets, or too short"
        )
    raise TransportError(f"the launcher failed: {next((one.reason for one in outputs if not one.ok), 'no answer')}")
