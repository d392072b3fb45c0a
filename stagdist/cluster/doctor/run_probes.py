"""Runs the two probes: one on every host over ssh, and one on every rank through a launcher."""

import base64
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from stagdist.cluster.doctor import link_probe
from stagdist.cluster.doctor.facts import ClockOffset, HostFacts, Links, Survey
from stagdist.cluster.doctor.host_probe import ANSWER_PREFIX
from stagdist.cluster.hosts import start as launchers
from stagdist.cluster.hosts.hostfile import Host, hostfile_text
from stagdist.cluster.hosts.remote import SSH_FAILED, Finished, on_all, remote_command, run_here, run_on, ssh_words
from stagdist.errors import TransportError
from stagdist.files import writing
from stagdist.parallel.grid import Grid
from stagdist.parallel.lost_peer_phrases import peer_closed

ROOT = Path(__file__).resolve().parents[3]
"""Folder that holds the package; it must be at the same path on all hosts."""

PROBE = "stagdist.cluster.doctor.host_probe"
EXAMINE_S = 90.0
"""Seconds for the report of one host; writing the test file takes most of it."""

CLOCK_S = 15.0
CLOCK_ROUNDS = 8
_CLOCK_MARK = "STAGDIST-CLOCK "
_CLOCK = f"import sys, time\nfor _ in sys.stdin:\n    print('{_CLOCK_MARK}%r' % time.time(), flush=True)"


@dataclass(frozen=True)
class HostAccess:
    """How to run something on a host."""

    alone: bool = False  # there is only this machine; no ssh

    def ask(self, host: str, question: dict[str, Any], timeout_s: float = EXAMINE_S) -> dict[str, Any]:
        """The answer of a host.

        Raises:
            TransportError: there is none; says why and what helps.
        """
        words, stdin = [sys.executable, "-m", PROBE], json.dumps(question) + "\n"
        if self.alone:
            done = run_here(words, timeout_s, folder=ROOT, stdin=stdin)
        else:
            done = run_on(host, words, timeout_s, folder=ROOT, stdin=stdin)
        lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER_PREFIX)]
        if done.ok and lines:
            answer: dict[str, Any] = json.loads(lines[-1].removeprefix(ANSWER_PREFIX))
            return answer
        if done.code == SSH_FAILED or (done.code is None and not done.stderr):
            raise TransportError(
                f"does not answer ssh ({done.reason}); try `ssh {host} true`: it must work without a question, "
                "then look at power, network and keys"
            )
        if "ModuleNotFoundError" in done.reason:
            raise TransportError(
                f"lacks a package ({done.reason}); install it there: pip install -c constraints.txt -e ."
            )
        if done.code in (1, 2, 127) and ("cd:" in done.stderr or "failed to run command" in done.stderr):
            raise TransportError(
                f"cannot start Python ({done.reason}); put code and environment at the same paths on every host: "
                f"{ROOT} and {sys.executable}"
            )
        raise TransportError(f"its examination failed ({done.reason}); run `{sys.executable} -m {PROBE}` there")

    def clock(self, host: str) -> ClockOffset | None:
        """A host's clock, from the fastest of several exchanges; None where they fail.

        The answer was given half a round trip before it arrived, give or take that half.
        """
        if self.alone:
            return ClockOffset(0.0, 0.0)
        line = remote_command([sys.executable, "-I", "-S", "-u", "-c", _CLOCK], CLOCK_S)
        words = ["timeout", "--kill-after=2", f"{CLOCK_S:g}", *ssh_words(host, line)]
        samples = []
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        with (
            contextlib.suppress(BrokenPipeError),
            subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=quiet, text=True, bufsize=1) as process,
        ):
            for _ in range(CLOCK_ROUNDS):
                sent = time.time()
                process.stdin.write("\n")  # type: ignore[union-attr]
                answer = _marked_line(process.stdout)  # type: ignore[arg-type]
                if answer is None:
                    break
                samples.append((sent, float(answer), time.time()))
        return clock_from(samples)


def _marked_line(stream: IO[str]) -> str | None:
    """What follows the next mark; a login script may print other lines. None at the end."""
    line = next((line for line in stream if line.startswith(_CLOCK_MARK)), None)
    return None if line is None else line.removeprefix(_CLOCK_MARK)


def clock_from(samples: Sequence[tuple[float, float, float]]) -> ClockOffset | None:
    """Offset from exchanges (sent here, read there, received here), all in seconds; the fastest one counts."""
    if not samples:
        return None
    sent, there, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return ClockOffset(there - (sent + received) / 2, (received - sent) / 2)


def ask_all(slots: dict[str, int], reach: HostAccess, folder: Path, checkpoints: Path | None, write_mib: int) -> Survey:
    """Examine all hosts.

    Args:
        slots: ranks by host, in the order of the ranks.
        reach: how to get there.
        folder: working directory of the launcher.
        checkpoints: folder to try; None to leave it out.
        write_mib: size of the file to measure the disk with, in MiB.
    """
    hosts = tuple(slots)
    kept = checkpoints and str(checkpoints.absolute())
    question = {"hosts": list(hosts), "folder": str(folder), "checkpoints": kept, "token": secrets.token_hex(8)}
    contents = {host: secrets.token_hex(16) for host in hosts}
    facts: dict[str, HostFacts] = {}
    try:
        first = question | {"action": "examine", "mib": write_mib}
        found = on_all(hosts, lambda host: _try(reach, host, first | {"host": host, "content": contents[host]}))
        facts = {
            host: TypeAdapter(HostFacts).validate_python(answer)
            for host, answer in found.items()
            if isinstance(answer, dict)
        }
        silent = {host: str(answer) for host, answer in found.items() if not isinstance(answer, dict)}
        clocks = {host: clock for host, clock in on_all(facts, reach.clock).items() if clock is not None}
        seen = _who_sees_whom(facts, reach, question, contents) if checkpoints else {}
    finally:
        if checkpoints:
            _clean(hosts, reach, question, facts)
    return Survey(hosts, slots, facts, silent, clocks, seen)


def _try(reach: HostAccess, host: str, question: dict[str, Any]) -> dict[str, Any] | str:
    try:
        return reach.ask(host, question)
    except TransportError as error:
        return str(error)


def _who_sees_whom(
    facts: dict[str, HostFacts], reach: HostAccess, question: dict[str, Any], contents: dict[str, str]
) -> dict[str, dict[str, bool]]:
    writers = [host for host, fact in facts.items() if fact.storage and not fact.storage.problem]
    answers = on_all(writers, lambda host: _try(reach, host, question | {"action": "read", "hosts": writers}))
    return {
        reader: {writer: answer.get(writer) == contents[writer] for writer in writers}
        for reader, answer in answers.items()
        if isinstance(answer, dict)
    }


def _clean(hosts: Sequence[str], reach: HostAccess, question: dict[str, Any], facts: dict[str, HostFacts]) -> None:
    """Also where the examination was interrupted; one after the other may have made the folders, so all get all."""
    made = {path for fact in facts.values() if fact.storage for path in fact.storage.created}
    last = question | {"action": "clean", "created": sorted(made, key=len)}
    on_all(list(facts) or hosts, lambda host: _try(reach, host, last))


# --- links between ranks ----------------------------------------------------------------------------------------------

LAUNCHERS = ("pdsh", "openmpi", "torchrun")
LINK_PROBE = "stagdist.cluster.doctor.link_probe"
GRACE_S = 30.0
"""Seconds that launcher and Python need around the probe's own limit."""

_PIECE = re.compile(rf"{link_probe.RESULT_PREFIX} (\d+)/(\d+) ([A-Za-z0-9+/=]+) END")
_ERROR = re.compile(rf"{link_probe.ERROR_PREFIX} (rank .*?) END")
_ALARM = re.compile(rf"return code = -{signal.SIGALRM:d}\b|[Ss]ignal {signal.SIGALRM:d}\b")
"""What launchers say of a rank that its own time limit ended."""


@dataclass(frozen=True)
class LinkPlan:
    """How to measure."""

    grid: Grid  # of all ranks
    hosts: tuple[Host, ...]  # in the order of their ranks; empty for this machine alone
    launcher: str  # one of LAUNCHERS; without hosts DeepSpeed's local one is used
    master: str  # address of rank 0
    port: int  # of rank 0
    variables: Mapping[str, str]  # for the ranks; no secrets, plain
    largest_mib: int = 16  # size of the large messages, in MiB
    step_s: float = 30.0  # limit of each step
    limit_s: int = 150  # limit of all


def measure_links(plan: LinkPlan) -> Links:
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


def probe_words(plan: LinkPlan) -> list[str]:
    """Module and arguments of the probe."""
    grid = [str(size) for size in (plan.grid.pipe, plan.grid.data, plan.grid.tensor)]
    limits = ["--largest-mib", str(plan.largest_mib), "--timeout-s", f"{plan.step_s:g}", "--limit-s", str(plan.limit_s)]
    return [LINK_PROBE, "--grid", *grid, *limits]


def deepspeed_words(plan: LinkPlan, hostfile: Path) -> list[str]:
    """DeepSpeed's command line."""
    launcher = plan.launcher if plan.hosts else "local"
    words = launchers.deepspeed_words(
        launcher, plan.grid.world_size, hostfile, plan.master, plan.port, os.geteuid() == 0
    )
    return [*words, "--module", "--no_local_rank", *probe_words(plan)]


def _deepspeed(plan: LinkPlan, scratch: Path) -> Finished:
    hostfile = scratch / "hostfile"
    environment = (launchers.for_deepspeed if plan.hosts else launchers.for_deepspeed_here)(os.environ)
    variables = dict(plan.variables)
    if plan.hosts:
        hostfile.write_text(hostfile_text(plan.hosts))
        variables |= {"MASTER_ADDR": plan.master, "MASTER_PORT": str(plan.port)}
    exported = scratch / "deepspeed_env"
    with writing(exported, private=True) as stream:
        stream.writelines(f"{name}={value}\n" for name, value in variables.items())
    own = environment | {"DS_ENV_FILE": str(exported)}
    return run_here(deepspeed_words(plan, hostfile), plan.limit_s + GRACE_S, folder=ROOT, only=own)


def _torchrun(plan: LinkPlan) -> list[Finished]:
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
        return TypeAdapter(Links).validate_json(base64.b64decode("".join(parts[index] for index in sorted(parts))))
    errors = _ERROR.findall(text)
    if errors:
        first = sorted(errors, key=peer_closed)[0]
        raise TransportError(f"{len(errors)} ranks failed, the first: {first}")
    if any(one.code is None for one in outputs) or _ALARM.search(text):
        raise TransportError(
            "the ranks did not end within the time limit; a network that swallows packets, or too short"
        )
    raise TransportError(f"the launcher failed: {next((one.reason for one in outputs if not one.ok), 'no answer')}")
