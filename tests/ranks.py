"""Run a function on several real processes and return the result of each.

    losses = run_ranks("tests.training.test_parity:train_all", 4, {"cases": [...]})

The function lives at the top of an importable module, takes the payload and returns anything that pickles. It
finds its place in the usual variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) and sets up its own process group.

Importing the frameworks takes seconds of processor time. A server process (`multiprocessing`'s fork server) does it
once, on the CPU, and ranks are forks of it; ranks with an `env` of their own are fresh processes. Forks share Python's
hash seed, the state of numpy's generator and whatever modules read from the environment when they are imported: what
depends on such things is left to the tests that start ranks through a launcher. Variables that Python itself reads when
it starts have no effect in `env`.

`fork_script` runs a script in forks of the same server as `python script arguments` would, `run_script` to its end.
"""

import contextlib
import ctypes
import faulthandler
import fcntl
import importlib
import io
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.02
GRACE_S = 0.3
GUARD_S = 600.0
"""Limit of a wait that only guards against a hang. Long, because a busy machine is no failure."""
LOG_CHARACTERS = 4000
PR_SET_PDEATHSIG = 1
_PORTS = range(20000, 30000)
BARE = "STAGDIST_TEST_BARE_SERVER"
"""Variable with which the server imports no framework: for a test of the processes alone."""


class RankError(RuntimeError):
    """A rank failed or did not end in time; carries the rank, its traceback and the end of its output."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    target: str, world_size: int, payload: Any = None, timeout_s: float = GUARD_S, env: dict[str, str] | None = None
) -> list[Any]:
    """Call `target` ("module:function") with `payload` on `world_size` local processes; results by rank.

    The ranks see no GPU unless `env` (added to this process's environment) says otherwise.

    Raises:
        RankError: the first rank that failed, not those that failed because of it; or the time is up.
    """
    with tempfile.TemporaryDirectory(prefix="stagdist-ranks-") as name:
        folder = Path(name)
        (folder / "payload").write_bytes(pickle.dumps((target, payload, timeout_s)))
        variables = _environment(world_size, env or {})
        if not env:
            _start_server(variables)
        fork, fresh = multiprocessing.get_context("forkserver").Process, multiprocessing.get_context("spawn").Process
        theirs, ours = multiprocessing.Pipe(duplex=False)
        ranks: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                place = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                _log(folder, rank).touch()
                ranks.append((fresh if env else fork)(target=_run, args=(folder, rank, place, theirs)))
                _begin(ranks[-1], rank)
            _wait(ranks, folder, time.monotonic() + timeout_s, timeout_s)
            return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]
        finally:
            _end(ranks)
            theirs.close()
            ours.close()


@dataclass(frozen=True)
class Script:
    """A Python script and the surroundings of its processes.

    Attributes:
        path: the script, run as `__main__`.
        arguments: its command line.
        folder: working directory.
        out, err: files to append standard output and standard error to; they may be the same.
        given: file that is standard input.
        before: called in every process before the script runs, to plant a fault; a function of a module.
    """

    path: Path
    arguments: tuple[str, ...]
    folder: Path
    out: Path
    err: Path
    given: Path = Path(os.devnull)
    before: Callable[[], None] | None = None


def fork_script(script: Script, world_size: int | None) -> list[BaseProcess]:
    """Run a script in forks of the server: `world_size` ranks, or a process without a launcher where it is None.

    A process ends without Python's `atexit`. Callers end the other ranks of a world in which one has failed.
    """
    variables = _environment(world_size or 1, {})
    _start_server(variables)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in variables.items() if name not in names}
    processes: list[BaseProcess] = []
    for rank in range(world_size or 1):
        place = alone if world_size is None else {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        context = multiprocessing.get_context("forkserver")
        processes.append(context.Process(target=_run_script, args=(script, place)))
        _begin(processes[-1], rank)
    return processes


def run_script(path: Path, *arguments: str | Path, timeout_s: float = GUARD_S) -> "subprocess.CompletedProcess[str]":
    """Run a script to its end in one fork without a launcher, in the working directory of this process.

    Raises:
        AssertionError: it still runs after `timeout_s`.
    """
    words = tuple(map(str, arguments))
    with tempfile.TemporaryDirectory(prefix="stagdist-script-") as name:
        out, err = Path(name, "out"), Path(name, "err")
        processes = fork_script(Script(path, words, Path.cwd(), out, err), None)
        try:
            processes[0].join(timeout_s)
            code = processes[0].exitcode
        finally:
            end_processes(processes)
        printed, errors = (file.read_text(errors="replace") if file.exists() else "" for file in (out, err))
        assert code is not None, f"still running after {timeout_s:g} s:\n{printed}{errors}"
        return subprocess.CompletedProcess([str(path), *words], code, printed, errors)


def end_processes(processes: list[BaseProcess]) -> None:
    """Kill forks that still run, with what is in their process groups."""
    for process in processes:
        if process.exitcode is None and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # one that does not lead its group yet
    for process in processes:
        process.join()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on, another one at each call in any process of this user.

    Taken below the range the kernel gives to outgoing connections, so none of those takes it before it is used.
    """
    with (Path(tempfile.gettempdir()) / f"stagdist-ports-{os.getuid()}").open("a+") as last:
        fcntl.flock(last, fcntl.LOCK_EX)
        last.seek(0)
        port = int(last.read() or _PORTS[-1])
        while True:
            port = port + 1 if port + 1 in _PORTS else _PORTS[0]
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                last.truncate(0)
                last.write(str(port))
                return port


# --- the parent -------------------------------------------------------------------------------------------------


def _environment(world_size: int, extra: dict[str, str]) -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        **extra,
    }


def _start_server(variables: Mapping[str, str]) -> None:
    """Start the server unless it runs; what the frameworks read from the environment when imported is that of ranks."""
    kept = {name: os.environ.get(name) for name in variables}
    multiprocessing.set_forkserver_preload(["tests.rank_server"])
    try:
        os.environ.update(variables)
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin(process: BaseProcess, rank: int) -> None:
    try:
        process.start()
    except EOFError:
        raise RankError(rank, f"rank {rank} did not start: the server of which ranks are forks has ended") from None


def _wait(ranks: list[BaseProcess], folder: Path, deadline: float, timeout_s: float) -> None:
    """Return when every rank has left its result; raise as soon as one has failed."""
    while True:
        ended = [rank for rank, process in enumerate(ranks) if process.exitcode is not None]
        if ended:
            time.sleep(GRACE_S)  # the first failure and those it causes are close together: collect them all
            raise _first_failure(ranks, folder)
        if all(_result(folder, rank).exists() for rank in range(len(ranks))):
            return
        if time.monotonic() > deadline:
            late = [rank for rank in range(len(ranks)) if not _result(folder, rank).exists()]
            raise RankError(
                late[0],
                f"ranks {late} of {len(ranks)} did not end within {timeout_s:g} s; output of rank {late[0]}, with "
                f"its stack shortly before the end:\n{_tail(folder, late[0])}",
            )
        time.sleep(POLL_S)


def _first_failure(ranks: list[BaseProcess], folder: Path) -> RankError:
    """The rank whose failure came first, then a line about each other. One that ended without a report comes first."""
    reports: list[tuple[float, int, str]] = []
    for rank, process in enumerate(ranks):
        if _failure(folder, rank).exists():
            moment, report = pickle.loads(_failure(folder, rank).read_bytes())
            reports.append((moment, rank, report))
        elif process.exitcode is not None:
            reports.append((0.0, rank, f"exit code {process.exitcode} without result or exception\n"))
    (_, rank, report), *later = sorted(reports)
    afterwards = "".join(f"then rank {other}: {text.splitlines()[-1]}\n" for _, other, text in later)
    return RankError(
        rank, f"rank {rank} of {len(ranks)} failed:\n{report}{afterwards}output of rank {rank}:\n{_tail(folder, rank)}"
    )


def _end(ranks: list[BaseProcess]) -> None:
    """End our own processes and what they started; each leads a process group of its own."""
    started = [(process, process.pid) for process in ranks if process.pid is not None]
    for process, pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        process.kill()  # one that does not lead its group yet
    for process, _ in started:
        process.join()
        process.close()


def _tail(folder: Path, rank: int) -> str:
    return _log(folder, rank).read_text(errors="replace")[-LOG_CHARACTERS:]


def _log(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.log"


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.result"


def _failure(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.failure"


# --- the rank ---------------------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: ranks with their server, the server with the test run."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _begin_rank(variables: Mapping[str, str]) -> None:
    os.setsid()
    end_with_parent()
    os.environ.clear()
    os.environ.update(variables)


def _run_script(script: Script, variables: Mapping[str, str]) -> None:
    _begin_rank(variables)
    os.chdir(script.folder)
    appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for standard, (path, flags) in enumerate(
        [(script.given, os.O_RDONLY), (script.out, appending), (script.err, appending)]
    ):
        descriptor = os.open(path, flags)
        os.dup2(descriptor, standard)
        os.close(descriptor)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [str(script.path), *script.arguments]
    if script.before is not None:
        script.before()
    runpy.run_path(str(script.path), run_name="__main__")


def _run(folder: Path, rank: int, variables: Mapping[str, str], all_done: Connection) -> None:
    _begin_rank(variables)
    with _log(folder, rank).open("wb") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    target, payload, timeout_s = pickle.loads((folder / "payload").read_bytes())
    faulthandler.dump_traceback_later(max(0.8 * timeout_s, timeout_s - 5), exit=False)
    try:
        module, function = target.split(":")
        result = pickle.dumps(getattr(importlib.import_module(module), function)(payload))
    except BaseException:
        _leave(_failure(folder, rank), pickle.dumps((time.time(), traceback.format_exc())))
        sys.exit(1)
    faulthandler.cancel_dump_traceback_later()
    _leave(_result(folder, rank), result)
    # Stay until the parent has every result: rank 0 serves the store that slower ranks may still ask.
    with contextlib.suppress(EOFError):
        all_done.recv()


def _leave(path: Path, content: bytes) -> None:
    """Write to another file and rename it, so that the parent never reads an incomplete one."""
    aside = path.with_suffix(".part")
    aside.write_bytes(content)
    aside.rename(path)
