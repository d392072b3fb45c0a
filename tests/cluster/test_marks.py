"""Processes of a job are found by their mark and ended, those of others are not."""

import os
import subprocess
import sys
import time
from pathlib import Path

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, job_processes, kill_job


def sleeper(mark: str | None) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ) if mark is None else {**os.environ, JOB_VARIABLE: mark}
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)


def test_every_process_of_a_job_ends_and_no_other() -> None:
    job = f"test{os.getpid()}"
    processes = [sleeper(mark) for mark in (f"{job}.1", f"{job}.2", f"{job}0.1", None)]
    try:
        deadline = time.monotonic() + 10
        while len(job_processes(job)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert {one.pid for one in job_processes(job)} == {processes[0].pid, processes[1].pid}
        assert [one.pid for one in job_processes(f"{job}.2")] == [processes[1].pid]
        ended, left = kill_job(job)
        assert {one.pid for one in ended} == {processes[0].pid, processes[1].pid} and left == []
        assert [process.wait(10) for process in processes[:2]] == [-9, -9]
        assert [process.poll() for process in processes[2:]] == [None, None]
        assert kill_job(job) == ([], [])
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_host_that_does_not_see_what_it_needs_is_told_with_its_leftovers_ended(tmp_path: Path) -> None:
    job = f"needs{os.getpid()}"
    process = sleeper(job)
    try:
        deadline = time.monotonic() + 10
        while not job_processes(job) and time.monotonic() < deadline:
            time.sleep(0.02)
        words = [sys.executable, "-m", "stagdist.cluster.hosts.leftovers", job, "--end", "--needs"]
        done = subprocess.run([*words, str(tmp_path / "away")], capture_output=True, text=True)
        assert done.returncode == 3 and f"{tmp_path / 'away'} is not there" in done.stderr and done.stdout == ""
        assert process.wait(10) == -9
        assert subprocess.run([*words, str(tmp_path)], capture_output=True).returncode == 0
    finally:
        process.kill()
        process.wait()
