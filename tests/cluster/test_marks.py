"""Processes of a run are found by their mark and ended, those of others and of the present attempt are not."""

import os
import subprocess
import sys
import time

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, end_earlier, processes_with, service_mark


def sleeper(mark: str | None) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ) if mark is None else {**os.environ, JOB_VARIABLE: mark}
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)


def wait_for(number: int, run: str) -> None:
    """Until so many processes have a mark that begins like this."""
    deadline = time.monotonic() + 10
    while len(processes_with(JOB_VARIABLE, lambda value: value.startswith(run))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_earlier_process_of_a_run_ends_and_no_other() -> None:
    run = f"test{os.getpid()}"
    marks = (f"{run}.1", f"{run}.2", run, f"{run}.now", f"{run}0.1", None)
    processes = [sleeper(mark) for mark in marks]
    try:
        wait_for(5, run)
        assert end_earlier(run, f"{run}.now") == (3, 0)
        assert [process.wait(10) for process in processes[:3]] == [-9] * 3
        assert [process.poll() for process in processes[3:]] == [None] * 3
        assert end_earlier(run, f"{run}.now") == (0, 0)
        assert end_earlier(f"{run}.now") == (1, 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_what_serves_between_attempts_is_spared_only_where_it_is_kept() -> None:
    run = f"served{os.getpid()}"
    processes = [sleeper(mark) for mark in (f"{run}.1", service_mark(f"{run}.1"))]
    try:
        wait_for(2, run)
        assert end_earlier(run, f"{run}.2", keep_service=True) == (1, 0)
        assert processes[0].wait(10) == -9 and processes[1].poll() is None
        assert end_earlier(run, f"{run}.2") == (1, 0)
        assert processes[1].wait(10) == -9
    finally:
        for process in processes:
            process.kill()
            process.wait()
