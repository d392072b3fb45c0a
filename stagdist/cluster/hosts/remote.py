"""Commands on the hosts of a cluster over ssh: argument lists, no shell of ours, and always a time limit."""

import math
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from stagdist.cluster.hosts.hostfile import check_host_name
from stagdist.cluster.hosts.leftovers import kill_group
from stagdist.errors import ConfigError

SSH_FAILED = 255
"""What ssh returns when it did not get as far as running the command."""

CONNECT_S = 5
"""Seconds that a host has to answer."""

AT_ONCE = 32
"""Connections that are opened at the same time."""

_KEEP_ALIVE_S = 5
_GRACE_S = 3.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int | None  # exit code, minus the signal's number after a signal; None when its time was up
    stdout: str  # what it wrote
    stderr: str  # what it and ssh complained of
    wall_s: float  # seconds it took, connecting included

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.code == 0

    @property
    def reason(self) -> str:
        """Why it failed, in one line: the last thing it said, or its code."""
        if self.code is None:
            return f"no end within {self.wall_s:.0f} s"
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.code}"


def remote_command(
    words: Sequence[str],
    limit_s: float | None,
    folder: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """One line for the shell on a host in which nothing but our own words is a command.

    The host ends the command by itself (with its process group) when the time is up, also when ssh is gone by then;
    None sets no limit. Values of the environment are visible in process lists, so they must not be secrets.
    """
    assignments = [f"{name}={value}" for name, value in (environment or {}).items()]
    limit = [] if limit_s is None else ["timeout", "--kill-after=2", f"{limit_s:g}"]
    line = f"exec {shlex.join([*limit, *(['env', *assignments] if assignments else []), *words])}"
    return line if folder is None else f"cd -- {shlex.quote(str(folder))} && {line}"


def ssh_words(host: str, line: str, silence_s: float = 15.0) -> list[str]:
    """The ssh command that runs a line on a host; asks nothing, and ends when no answer comes for `silence_s` seconds.

    Raises:
        ConfigError: the host name could be taken for something else.
    """
    check_host_name(host)
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(CONNECT_S),
        "ServerAliveInterval": str(_KEEP_ALIVE_S),
        "ServerAliveCountMax": str(math.ceil(silence_s / _KEEP_ALIVE_S)),
        "ForwardX11": "no",
        "ClearAllForwardings": "yes",
        "ControlMaster": "no",  # one that goes to the background would hold our pipes open
        "LogLevel": "ERROR",
    }
    return ["ssh", "-T", *(word for item in options.items() for word in ("-o", "=".join(item))), "--", host, line]


def run_on(
    host: str,
    words: Sequence[str],
    timeout_s: float,
    *,
    folder: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
) -> Finished:
    """Run a command on a host and wait for its end, at most `timeout_s` seconds plus the time to connect.

    Args:
        host: name for ssh.
        words: program and arguments; quoted for the host's shell.
        timeout_s: seconds the command may take.
        folder: working directory on the host.
        environment: added to the command's variables; visible in process lists.
        stdin: text for its standard input.

    Raises:
        ConfigError: the host name is refused, or there is no ssh on this machine.
    """
    line = remote_command(words, timeout_s, folder, environment)
    return run_here(ssh_words(host, line), timeout_s + CONNECT_S + _GRACE_S, stdin=stdin)


def run_here(words: Sequence[str], timeout_s: float, *, stdin: str = "") -> Finished:
    """Run a command on this machine likewise; when the time is up its process group is killed.

    Raises:
        ConfigError: there is no such program.
    """
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            list(words), text=True, errors="replace", start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{words[0]} cannot be started: {error.strerror}: {error.filename}") from error
    try:
        out, err = process.communicate(stdin, timeout=timeout_s)
        return Finished(process.returncode, out, err, time.monotonic() - started)
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        try:
            out, err = process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:  # something left our process group and holds the pipes
            out, err = "", ""
        return Finished(None, out, err, time.monotonic() - started)
    except BaseException:
        kill_group(process.pid)
        process.wait()
        raise


def on_all(hosts: Iterable[str], action: Callable[[str], Result], at_once: int = AT_ONCE) -> dict[str, Result]:
    """Do something for every host at the same time; results in the order of the hosts.

    An interruption does not wait for hosts that do not answer: their commands end at their time limit.

    Raises:
        BaseException: the first of what the actions raised.
    """
    names = list(hosts)
    places = threading.Semaphore(at_once)
    results: dict[str, Result] = {}
    raised: list[BaseException] = []

    def work(host: str) -> None:
        with places:
            try:
                results[host] = action(host)
            except BaseException as error:
                raised.append(error)

    threads = [threading.Thread(target=work, args=(host,), daemon=True) for host in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return {host: results[host] for host in names}
