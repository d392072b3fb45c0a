"""The complete suite: two pytest processes and mypy at once, which is what `make test` runs after ruff.

    python -m tests.suite [arguments of pytest]

Tests of launchers and hosts mostly wait for processes to start and for time limits to pass, so the tests that compute
run beside them. The output of the second process is shown as it comes, that of the others when they have ended.
"""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.ranks import ROOT, end_with_parent

WAITING = ("tests/lab", "tests/launch", "tests/cluster", "tests/gpu", "tests/evaluation", "tests/parallel")
"""Folders of the first process; the second takes all others. Both take about the same time on two cores."""
NO_TESTS_COLLECTED = 5


@dataclass
class Job:
    """A command of the suite.

    Attributes:
        name: what it is.
        command: how it is started.
        log: file for its output; None: the terminal.
    """

    name: str
    command: list[str]
    log: Path | None
    seconds: float = 0.0
    process: "subprocess.Popen[bytes]" = field(init=False)

    def start(self) -> None:
        """Start it; it ends with this process."""
        with contextlib.ExitStack() as stack:
            stream = None if self.log is None else stack.enter_context(self.log.open("wb"))
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=None if stream is None else subprocess.STDOUT, preexec_fn=end_with_parent,
            )  # fmt: skip


def jobs(folder: Path, arguments: list[str]) -> list[Job]:
    """Everything that runs; mypy gives way to tests, some of which have time limits."""
    pytest = [sys.executable, "-m", "pytest", *arguments]
    first = [*pytest, "-o", "cache_dir=.pytest_cache/waiting", *WAITING]
    second = [*pytest, "tests", *(f"--ignore={name}" for name in WAITING)]
    return [
        Job("mypy", ["nice", sys.executable, "-m", "mypy"], folder / "mypy.log"),
        Job("tests of launchers and hosts", first, folder / "waiting.log"),
        Job("all other tests", second, None),
    ]


def run(started: list[Job]) -> int:
    """Wait for all jobs and print what they had to say; exit code 1 if one failed or no test ran at all."""
    began, running = time.monotonic(), list(started)
    while running:
        for job in running:
            if job.process.poll() is not None:
                job.seconds = time.monotonic() - began
                running.remove(job)
                break
        else:
            time.sleep(0.1)
    for job in started:
        if job.log is not None:
            print(f"\n--- {job.name} ---\n{job.log.read_text(errors='replace')}", end="")
    codes = {job.name: job.process.returncode for job in started}
    print("\n" + "\n".join(f"{job.seconds:7.0f} s  exit code {codes[job.name]}  {job.name}" for job in started))
    tests = [code for name, code in codes.items() if name != "mypy"]
    failed = [code for code in codes.values() if code not in (0, NO_TESTS_COLLECTED)]
    return int(bool(failed) or all(code == NO_TESTS_COLLECTED for code in tests))


def main(arguments: list[str]) -> int:
    """Run the suite; one job after the other where there is one core only."""
    folder = ROOT / ".pytest_cache" / "suite"
    folder.mkdir(parents=True, exist_ok=True)
    everything = jobs(folder, arguments)
    together = len(os.sched_getaffinity(0)) > 1
    for job in everything:
        job.start()
        if not together:
            job.process.wait()
    return run(everything)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
