"""Asks all hosts at the same time: what they are, what their clocks say, and whether they share the checkpoints."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stagdist.cluster.doctor.facts import Clock, HostFacts
from stagdist.cluster.doctor.host_probe import MARK
from stagdist.cluster.hosts.remote import SSH_FAILED, on_all, remote_command, run_here, run_on, ssh_words
from stagdist.errors import TransportError

ROOT = Path(__file__).resolve().parents[3]
"""Folder that holds the package; it must be at the same path on all hosts."""

PROBE = "stagdist.cluster.doctor.host_probe"
EXAMINE_S = 90.0
"""Seconds for one host to tell everything; writing the test file takes most of it."""

CLOCK_S = 15.0
CLOCK_ROUNDS = 8
_CLOCK_MARK = "STAGDIST-CLOCK "
_CLOCK = f"import sys, time\nfor _ in sys.stdin:\n    print('{_CLOCK_MARK}%r' % time.time(), flush=True)"


@dataclass(frozen=True)
class Reach:
    """How to run something on a host.

    Attributes:
        alone: there is only this machine; no ssh.
    """

    alone: bool = False

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
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.ok and lines:
            answer: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
            return answer
        if done.code == SSH_FAILED or (done.code is None and not done.stderr):
            raise TransportError(
                f"does not answer ssh ({done.reason}); try `ssh {host} true`: it must work without a question, "
                "then look at power, network and keys"
            )
        if done.code in (1, 2, 127) and ("cd:" in done.stderr or "failed to run command" in done.stderr):
            raise TransportError(
                f"cannot start Python ({done.reason}); put code and environment at the same paths on every host: "
                f"{ROOT} and {sys.executable}"
            )
        raise TransportError(f"its examination failed ({done.reason}); run `{sys.executable} -m {PROBE}` there")

    def clock(self, host: str) -> Clock | None:
        """A host's clock, from the fastest of several exchanges; None where they fail.

        The answer was given half a round trip before it arrived, give or take that half.
        """
        if self.alone:
            return Clock(0.0, 0.0)
        line = remote_command([sys.executable, "-I", "-S", "-u", "-c", _CLOCK], CLOCK_S)
        with _conversation(ssh_words(host, line), CLOCK_S) as process:
            samples = []
            for _ in range(CLOCK_ROUNDS):
                sent = time.time()
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write("\n")  # type: ignore[union-attr]
                answer = _marked_line(process.stdout)  # type: ignore[arg-type]
                received = time.time()
                if answer is None:
                    break
                samples.append((sent, float(answer), received))
        return clock_from(samples)


def _marked_line(stream: IO[str]) -> str | None:
    """What follows the next mark; a login script may print other lines. None at the end."""
    line = next((line for line in stream if line.startswith(_CLOCK_MARK)), None)
    return None if line is None else line.removeprefix(_CLOCK_MARK)


def clock_from(samples: Sequence[tuple[float, float, float]]) -> Clock | None:
    """Offset from exchanges (sent here, read there, received here), all in seconds; the fastest one counts."""
    if not samples:
        return None
    sent, there, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return Clock(there - (sent + received) / 2, (received - sent) / 2)


@contextlib.contextmanager
def _conversation(words: Sequence[str], limit_s: float) -> Iterator["subprocess.Popen[str]"]:
    """A process to talk with line by line; it is killed at the end, or when the time is up."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        start_new_session=True,
    )

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


@dataclass(frozen=True)
class Answers:
    """What all hosts told; see `Survey` for the fields."""

    facts: dict[str, HostFacts]
    silent: dict[str, str]
    clocks: dict[str, Clock]
    seen: dict[str, dict[str, bool]]


def ask_all(hosts: Sequence[str], reach: Reach, folder: Path, checkpoints: Path | None, write_mib: int) -> Answers:
    """Examine all hosts.

    Args:
        hosts: names in the order of their ranks.
        reach: how to get there.
        folder: working directory of the launcher.
        checkpoints: folder to try; None to leave it out.
        write_mib: size of the file to measure the disk with, in MiB.
    """
    kept = checkpoints and str(checkpoints.absolute())
    question = {"hosts": list(hosts), "folder": str(folder), "checkpoints": kept, "token": secrets.token_hex(8)}
    contents = {host: secrets.token_hex(16) for host in hosts}
    facts: dict[str, HostFacts] = {}
    try:
        first = question | {"action": "examine", "mib": write_mib}
        found = on_all(hosts, lambda host: _try(reach, host, first | {"host": host, "content": contents[host]}))
        facts = {host: HostFacts.from_json(answer) for host, answer in found.items() if isinstance(answer, dict)}
        silent = {host: str(answer) for host, answer in found.items() if not isinstance(answer, dict)}
        clocks = {host: clock for host, clock in on_all(facts, reach.clock).items() if clock is not None}
        seen = _who_sees_whom(facts, reach, question, contents) if checkpoints else {}
    finally:
        if checkpoints:
            _clean(hosts, reach, question, facts)
    return Answers(facts, silent, clocks, seen)


def _try(reach: Reach, host: str, question: dict[str, Any]) -> dict[str, Any] | str:
    try:
        return reach.ask(host, question)
    except TransportError as error:
        return str(error)


def _who_sees_whom(
    facts: dict[str, HostFacts], reach: Reach, question: dict[str, Any], contents: dict[str, str]
) -> dict[str, dict[str, bool]]:
    writers = [host for host, fact in facts.items() if fact.storage and not fact.storage.problem]
    answers = on_all(writers, lambda host: _try(reach, host, question | {"action": "read", "hosts": writers}))
    return {
        reader: {writer: answer.get(writer) == contents[writer] for writer in writers}
        for reader, answer in answers.items()
        if isinstance(answer, dict)
    }


def _clean(hosts: Sequence[str], reach: Reach, question: dict[str, Any], facts: dict[str, HostFacts]) -> None:
    """Also where the examination was interrupted; one after the other may have made the folders, so all get all."""
    made = {path for fact in facts.values() if fact.storage for path in fact.storage.created}
    last = question | {"action": "clean", "created": sorted(made, key=len)}
    on_all(list(facts) or hosts, lambda host: _try(reach, host, last))
