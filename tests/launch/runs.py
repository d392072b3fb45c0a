"""Runs of the entry points in launch/: on forked ranks, or by a real command such as `deepspeed`.

    run = pretrain(tmp_path, tiny_config(corpus, "run"), "training.steps=4")
    assert run.wait() == 0, run.text()

Forked ranks (see `tests.ranks`) start in a fraction of the time of a launcher's. Use them unless the launcher, or the
start of a process, is what a test is about.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.ranks import GRACE_S, GUARD_S, Script, end_processes, fork_script, free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PRETRAIN = ROOT / "launch" / "pretrain.py"
POLL_S = 0.02
TERMINATE_S = 20
"""Seconds that ranks get to end after SIGTERM, as from a launcher."""
UNDER_WAY: "list[tuple[Run | subprocess.Popen[str], Callable[[], None]]]" = []
"""What tests have started, and what ends it with all that it started; tests in tests/launch leave nothing running."""


class Run(ABC):
    """A command that has been started in a folder; its output grows in files."""

    def __init__(self, folder: Path, *, one_file: bool):
        self.folder = folder
        moment = time.monotonic_ns()
        self.out = folder / f"output-{moment}.txt"
        self.err = self.out if one_file else folder / f"errors-{moment}.txt"
        self.out.touch()
        self.err.touch()
        UNDER_WAY.append((self, self.end))

    @abstractmethod
    def poll(self) -> int | None:
        """Exit code; None while the command runs."""

    @abstractmethod
    def ranks(self) -> list[psutil.Process]:
        """The processes that train or generate, by rank."""

    @abstractmethod
    def end(self) -> None:
        """Kill everything that was started and still runs."""

    def wait(self, timeout_s: float = GUARD_S) -> int:
        """Exit code; a command that does not end is ended and the test fails."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"still running after {timeout_s} s:\n{self.text()}")
            time.sleep(POLL_S)
        return code

    def text(self) -> str:
        """Everything printed so far; standard error where that is a file of its own."""
        return self.err.read_text(errors="replace")

    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.text().splitlines() if line.startswith("error: ")]

    def wait_until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = GUARD_S, poll_s: float = POLL_S
    ) -> None:
        """Return when the condition holds; the command must run until then."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.poll() is None, f"ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s:\n{self.text()}"
            time.sleep(poll_s)

    def wait_for_step(self, metrics: Path, step: int) -> None:
        """Return when a training step has been logged."""
        self.wait_until(lambda: any(line["step"] >= step for line in train_lines(metrics)), f"step {step}")

    def wait_for(self, num_bytes: int) -> bytes:
        """Standard output, once it is at least this long."""
        self.wait_until(lambda: self.out.stat().st_size >= num_bytes, f"{num_bytes} bytes of output")
        return self.out.read_bytes()


class Launch(Run):
    """A command in a process group of its own.

    Args:
        script: what distinguishes the command lines of its ranks.
        interactive: keep standard input open, see `give`; otherwise it is empty.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        *,
        script: Path = PRETRAIN,
        one_file: bool = True,
        interactive: bool = False,
    ):
        super().__init__(folder, one_file=one_file)
        self._script = script
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE if interactive else subprocess.DEVNULL, stdout=out,
                stderr=err, start_new_session=True, env=environment(),
            )  # fmt: skip

    def poll(self) -> int | None:
        return self.process.poll()

    def ranks(self) -> list[psutil.Process]:
        found = {}
        for child in self.family():
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                words = child.cmdline()
                if "python" in Path(words[0]).name and words.index(str(self._script)) <= 2:
                    found[int(child.environ()["RANK"])] = child
        return [found[rank] for rank in sorted(found)]

    def family(self) -> list[psutil.Process]:
        """Everything that was started, without the command itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def end(self) -> None:
        for pid in [self.process.pid, *(child.pid for child in self.family())]:
            if self.process.returncode is None or pid != self.process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def give(self, line: bytes) -> None:
        """Write to standard input, which stays open."""
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()


class Forks(Run):
    """A script on forked ranks; once one fails, `wait` ends the others as a launcher does.

    Args:
        ranks: number of ranks; None: one process without a launcher.
        given: standard input, or the file that it is, such as a named pipe.
        before: called in every process before the script runs, to plant a fault; a function of a module.
    """

    def __init__(
        self,
        folder: Path,
        script: Path,
        arguments: Sequence[str],
        *,
        ranks: int | None = 2,
        one_file: bool = True,
        given: bytes | Path = b"",
        before: Callable[[], None] | None = None,
    ):
        super().__init__(folder, one_file=one_file)
        words = given if isinstance(given, Path) else self.out.with_name(self.out.name + ".given")
        if isinstance(given, bytes):
            words.write_bytes(given)
        self._code: int | None = None
        self.processes = fork_script(Script(script, tuple(arguments), folder, self.out, self.err, words, before), ranks)

    def poll(self) -> int | None:
        """Exit code: of the first rank that failed, else 0; None while ranks run that none has failed."""
        codes = [process.exitcode for process in self.processes]
        if self._code is None and any(codes):
            time.sleep(GRACE_S)  # others may report it at about the same time
            self._terminate()
            self._code = next(code for code in codes if code)
        elif self._code is None and None not in codes:
            self._code = 0
        return self._code

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self.processes]

    def end(self) -> None:
        end_processes(self.processes)

    def _terminate(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.terminate()
        deadline = time.monotonic() + TERMINATE_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.end()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may wait to be fetched."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def environment() -> dict[str, str]:
    """Variables of a command; DeepSpeed does not write to standard output which device it found."""
    paths = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"}
    return {**kept, **fixed, "PATH": paths}


def tiny_config(corpus: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A p=2 model on bytes whose steps take some milliseconds; `sections` are merged in."""
    config: dict[str, Any] = {
        "name": name,
        "model": {
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "section_layers": [1, 1],
        },
        "parallel": {"timeout_s": 300},
        "data": {"tokenizer": "bytes", "corpora": [{"prefix": str(corpus)}], "split": [90, 5, 5]},
        "training": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"num_batches": 1},
        "checkpoint": {"interval_steps": 4, "keep_last": 3},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Store a configuration beside the runs folder."""
    path = folder / f"{config['name']}.yaml"
    aside = path.with_suffix(".partial")
    aside.write_text(yaml.safe_dump(config))
    aside.rename(path)  # a run that was started before may read it at this moment
    return path


def _pretrain_arguments(folder: Path, config: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    return ["--config", str(write_config(folder, config)), *(word for one in overrides for word in ("--set", one))]


def pretrain(
    folder: Path,
    config: dict[str, Any],
    *overrides: str,
    ranks: int | None = 2,
    before: Callable[[], None] | None = None,
) -> Forks:
    """Start `launch/pretrain.py` on forked ranks; see `Forks`."""
    return Forks(folder, PRETRAIN, _pretrain_arguments(folder, config, overrides), ranks=ranks, before=before)


def pretrain_alone(folder: Path, config: dict[str, Any], *overrides: str) -> Forks:
    """Run `python launch/pretrain.py` to its end, all sections in one process."""
    run = pretrain(folder, config, "parallel.pipeline_parallel_size=1", *overrides, ranks=None)
    run.wait()
    return run


def launch(
    folder: Path, config: dict[str, Any], *overrides: str, ranks: int = 2, launcher: str = "deepspeed"
) -> Launch:
    """Start `launch/pretrain.py` on this machine by a real command: python, deepspeed, torchrun or mpirun."""
    port = str(free_port())
    front = {
        "python": [sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port],
        "mpirun": mpirun(port, ranks),
    }[launcher]
    return Launch(folder, [*front, str(PRETRAIN), *_pretrain_arguments(folder, config, overrides)])


def mpirun(port: str, ranks: int) -> list[str]:
    """The beginning of a command line by which Open MPI starts ranks on this machine."""
    variables = ["-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={port}"]
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    return [str(BIN / "mpirun"), *options, "-np", str(ranks), *variables, sys.executable]


def train_lines(metrics: Path) -> list[dict[str, Any]]:
    """Complete lines of the training split."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().splitlines(keepends=True)
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in parsed if line["split"] == "train"]


def losses(folder: Path, name: str) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in train_lines(folder / "runs" / name / "metrics.jsonl")}
