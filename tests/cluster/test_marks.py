"""Processes of a run are found by their mark and ended, those of others and of the present attempt are not."""

import os
import subprocess
import sys
import time

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, end_earlier, processes_with


def sleeper(mark: str | None) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ) if mark is None else {**os.environ, JOB_VARIABLE: mark}
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)


def test_every_earlier_process_of_a_run_ends_and_no_other() -> None:
    run = f"test{os.getpid()}"
    marks = (f"{run}.1", f"{run}.2", run, f"{run}.now", f"{run}0.1", None)
    processes = [sleeper(mark) for mark in marks]
    try:
        deadline = time.monotonic() + 10
        while len(processes_with(JOB_VARIABLE, lambda value: value.startswith(run))) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert end_earlier(run, f"{run}.now") == (3, 0)
        assert [process.wait(10) for process in processes[:3]] == [-9] * 3
        assert [process.poll() for process in processes[3:]] == [None] * 3
        assert end_earlier(run, f"{run}.now") == (0, 0)
        assert end_earlier(f"{run}.now") == (1, 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()
