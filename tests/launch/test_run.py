"""The supervisor on one machine, over small scripts that live, fail and hang as told."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE
from tests.launch.runs import UNDER_WAY
from tests.ranks import run_script

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "launch" / "run.py"
SCRIPT = """
import os, sys, time
from pathlib import Path
from stagdist.telemetry.pulse import Phase, Pulse
pulse, rank, folder = Pulse.from_environment(), os.environ["RANK"], Path(sys.argv[-1])
number = len(list(folder.glob(f"start-{rank}-*")))
(folder / f"start-{rank}-{number}").touch()
def steps(first, last):
    for step in range(first, last + 1):
        pulse.beat(Phase.STEP, step)
        time.sleep(0.05)
"""


class Run:
    """A supervised script in a folder."""

    def __init__(self, folder: Path, body: str, *options: str):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        script = folder / "script.py"
        script.write_text(SCRIPT + body)
        words = [sys.executable, str(RUN), "--folder", str(folder / "run"), *options, "--", str(script), str(folder)]
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        UNDER_WAY.append((self.process, self.process.kill))  # ranks end with their supervisor

    def end(self, timeout_s: float = 90) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"still running after {timeout_s} s:\n{out}\n{err}") from None
        return self.process.returncode, out, err

    def wait_for(self, name: str) -> None:
        """Until a file of the script is there."""
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {name}: {self.end(1)}"
            time.sleep(0.05)

    def events(self) -> list[dict[str, Any]]:
        """The history."""
        events: list[dict[str, Any]] = json.loads((self.folder / "run" / "run.json").read_text())["events"]
        return events

    def left(self, patience_s: float = 0.0) -> list[psutil.Process]:
        """Processes of the job that still run."""
        deadline = time.monotonic() + patience_s
        while left := [one for one in psutil.process_iter() if self._is_ours(one)]:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        return left

    def agents(self) -> list[psutil.Process]:
        """The agents of the job."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in family if one.cmdline()[1:] == ["-m", "stagdist.cluster.supervision.agent"]]

    def sleepers(self) -> list[psutil.Process]:
        """What scripts have put to sleep in this folder."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.name() == "sleep" and one.cwd() == str(self.folder):
                    found.append(one)
        return found

    def _is_ours(self, one: psutil.Process) -> bool:
        try:
            return JOB_VARIABLE in one.environ() and one.cwd() == str(self.folder)
        except psutil.Error:
            return False


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may wait to be fetched."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_script_that_ends_in_order_is_shown_and_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, "print('rank', rank, 'says hello'); steps(0, 3)")
    code, out, err = run.end()
    assert code == 0, err
    assert out.splitlines() == ["rank 0 says hello"], "rank 0 is shown"
    (log,) = (tmp_path / "run/logs/attempt_001").glob("rank_00001.*.log")
    assert log.read_text() == "rank 1 says hello\n", "every rank is kept"
    assert [event["event"] for event in run.events()][-1] == "finish"
    assert not run.left()


def test_a_rank_that_dies_is_started_again_with_its_peers(tmp_path: Path) -> None:
    body = """
if number == 0:
    steps(0, 4)
    if rank == "1": os.kill(os.getpid(), 9)
    time.sleep(60)
steps(2, 6)
"""
    run = Run(tmp_path, body)
    code, _, err = run.end()
    assert code == 0, err
    assert "rank 1 on" in err and "was killed by SIGKILL" in err
    faults = [event for event in run.events() if event["event"] == "fault"]
    resumes = [event for event in run.events() if event["event"] == "resume"]
    assert [(fault["kind"], fault["rank"], fault["step"]) for fault in faults] == [("exit", 1, 4)]
    assert [(resume["step"], resume["lost_steps"]) for resume in resumes] == [(0, 0), (2, 2)]


STUCK = """
def deep_inside():
    STAND_STILL
def waiting_for_the_other():
    time.sleep(60)
if number == 0:
    steps(0, 2)
    if rank == "1":
        pulse.beat(Phase.FORWARD)
        deep_inside()
    pulse.beat(Phase.RECEIVE)
    waiting_for_the_other()
"""
WAYS = {"silent": "time.sleep(60)", "loud": "while True: print('here', flush=True); time.sleep(0.05)"}


def test_a_stuck_rank_is_named_with_its_stack_also_one_that_writes_all_the_time(tmp_path: Path) -> None:
    runs = [
        Run(tmp_path / name, STUCK.replace("STAND_STILL", way), "--hang-timeout-s", "4") for name, way in WAYS.items()
    ]
    for run in runs:
        code, _, err = run.end()
        assert code == 0, err
        (fault,) = [event for event in run.events() if event["event"] == "fault"]
        assert (fault["kind"], fault["rank"]) == ("stuck", 1) and "in phase forward" in fault["says"]
        stack = " ".join(fault["stack"])
        assert "deep_inside" in stack and "waiting_for_the_other" not in stack


HOPELESS = [
    ("print('error: the corpus is gone', file=sys.stderr); sys.exit(2)", 1, "starting again would not help"),
    ("print('error: no space, 0.%s GB' % number); sys.exit(1)", 2, "the same as the time before"),
    ("steps(0, number + 1); os.kill(os.getpid(), 9)", 2, "--max-restarts 1 is reached"),
]


def test_a_run_without_hope_is_given_up_with_its_first_error(tmp_path: Path) -> None:
    runs = [
        Run(tmp_path / str(number), body, "--max-restarts", "1" if "max" in complaint else "5")
        for number, (body, _, complaint) in enumerate(HOPELESS)
    ]
    for run, (_, attempts, complaint) in zip(runs, HOPELESS, strict=True):
        code, _, err = run.end()
        assert code == 1 and len(list(run.folder.glob("start-0-*"))) == attempts
        last = err.splitlines()[-1]
        assert last.startswith("error: first error: rank") and complaint in last, err
        assert not run.left()


def test_sigterm_makes_the_ranks_end_in_order(tmp_path: Path) -> None:
    body = """
import signal
signal.signal(signal.SIGTERM, lambda *_: ((folder / f"saved-{rank}").touch(), sys.exit(0)))
(folder / f"ready-{rank}").touch()
while True: steps(0, 1)
"""
    run = Run(tmp_path, body)
    run.wait_for("ready-0")
    run.wait_for("ready-1")
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 128 + signal.SIGTERM
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists() and not run.left()


def test_a_supervisor_that_is_killed_leaves_nothing_and_a_second_one_is_refused(tmp_path: Path) -> None:
    body = """
import signal
signal.signal(signal.SIGTERM, lambda *_: ((folder / f"asked-{rank}").touch(), time.sleep(1), os._exit(0)))
(folder / f"ready-{rank}").touch()
while True: steps(0, 1)
"""
    run = Run(tmp_path, body)
    run.wait_for("ready-0")
    run.wait_for("ready-1")
    second = Run(tmp_path, body)
    code, _, err = second.end()
    assert code == 2 and "another supervisor is at work" in err.splitlines()[-1]
    run.process.kill()
    run.end()
    assert run.left(15) == []
    assert (tmp_path / "asked-0").exists() and (tmp_path / "asked-1").exists(), "they were asked to save"


def test_an_agent_that_is_killed_is_named_and_its_ranks_end_with_it(tmp_path: Path) -> None:
    body = """
(folder / f"ready-{rank}").touch()
if number: steps(1, 2); sys.exit(0)
while True: steps(0, 1)
"""
    run = Run(tmp_path, body)
    run.wait_for("ready-0")
    run.wait_for("ready-1")
    (agent,) = run.agents()
    scripts = agent.children()
    agent.kill()
    code, _, err = run.end()
    assert code == 0, err
    (fault,) = [event for event in run.events() if event["event"] == "fault"]
    assert (fault["rank"], fault["says"].partition(" on ")[0]) == (0, "the agent of rank 0, 1")
    assert len(scripts) == 2 and not [one for one in scripts if alive(one)]


def test_a_supervisor_that_stood_still_starts_the_ranks_again_that_ended_without_it(tmp_path: Path) -> None:
    body = """
(folder / f"ready-{rank}").touch()
if number: steps(1, 2); sys.exit(0)
while True: steps(0, 1)
"""
    run = Run(tmp_path, body, "--host-timeout-s", "3")
    run.wait_for("ready-0")
    run.wait_for("ready-1")
    scripts = [script for agent in run.agents() for script in agent.children()]
    run.process.send_signal(signal.SIGSTOP)
    assert len(scripts) == 2 and not psutil.wait_procs(scripts, timeout=30)[1]
    run.process.send_signal(signal.SIGCONT)
    code, _, err = run.end()
    assert code == 0, err
    (fault,) = [event for event in run.events() if event["event"] == "fault"]
    assert fault["kind"] == "silent" and "was ended by its agent, which heard nothing from the supervisor" in err


def test_what_a_script_left_in_a_session_of_its_own_ends_with_a_killed_supervisor(tmp_path: Path) -> None:
    body = """
import subprocess
subprocess.Popen(["sleep", f"{600 + int(rank)}"], cwd=folder, start_new_session=True)
(folder / f"ready-{rank}").touch()
while True: steps(0, 1)
"""
    run = Run(tmp_path, body)
    run.wait_for("ready-0")
    run.wait_for("ready-1")
    assert len(run.sleepers()) == 2
    run.process.kill()
    run.end()
    assert run.left(15) == [] and run.sleepers() == []


def test_a_signal_before_the_script_can_hear_it_is_an_end_in_order_and_a_second_one_is_final(tmp_path: Path) -> None:
    body = "import signal; signal.signal(signal.SIGTERM, lambda *_: (folder / f'asked-{rank}').touch())\n"
    deaf = Run(tmp_path / "deaf", body + "(folder / f'ready-{rank}').touch()\nwhile True: steps(0, 1)")
    run = Run(tmp_path / "early", "(folder / f'ready-{rank}').touch(); time.sleep(60)")
    run.wait_for("ready-0")
    run.wait_for("ready-1")
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 143 and err.splitlines()[-1].endswith("SIGTERM: the ranks have shut down cleanly"), err
    deaf.wait_for("ready-0")
    deaf.wait_for("ready-1")
    deaf.process.send_signal(signal.SIGTERM)
    deaf.wait_for("asked-0")
    deaf.wait_for("asked-1")
    time.sleep(2.5)
    deaf.process.send_signal(signal.SIGTERM)
    code, _, err = deaf.end(20)
    assert code == 143 and "a second signal ended the ranks as they were" in err, err
    assert not deaf.left()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "nothing to run"),
        (["--", "nowhere.py"], "nowhere.py is no script"),
        (["--hostfile", "hosts", "--", "launch/pretrain.py", "--config", "configs/quickstart.yaml"], "$(touch hit)"),
        (["--start-with", "ssh", "--", "launch/pretrain.py"], "--start-with belongs to --hostfile"),
        (["--", "launch/pretrain.py", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--num-ranks", "3", "--", "launch/pretrain.py", "--config", "configs/quickstart.yaml"], "3"),
        (["--", "launch/pretrain.py", "--config", "configs/quickstart.yaml", "--sett", "a=1"], "--sett"),
        (["--", "launch/pretrain.py", "--config", "configs/quickstart.yaml", "--dry-run"], "--dry-run"),
        (["--", "launch/generate.py"], "--folder"),
        (["--hang-timeout-s", "nan", "--", "launch/pretrain.py"], "--hang-timeout-s"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_starts(tmp_path: Path, words: list[str], complaint: str) -> None:
    (tmp_path / "hosts").write_text("$(touch hit) slots=2\n")
    words = [str(tmp_path / word) if word == "hosts" else word for word in words]
    with contextlib.chdir(ROOT):
        done = run_script(RUN, *words)
    assert done.returncode == 2 and complaint in done.stderr.splitlines()[-1], done.stderr
    assert not (ROOT / "hit").exists()


def test_output_that_nobody_takes_does_not_end_the_run(tmp_path: Path) -> None:
    body = """
steps(0, 1)
if rank == "0": print(("x" * 300 + "\\n") * 2000, flush=True)
for step in range(10): time.sleep(0.5); pulse.beat(Phase.STEP, step)
(folder / f"through-{rank}").touch()
"""
    run = Run(tmp_path, body, "--max-restarts", "0", "--host-timeout-s", "3")
    for rank in "01":
        run.wait_for(f"through-{rank}")  # meanwhile its output is not read
    code, _, err = run.end()
    assert code == 0, err
    assert not [event for event in run.events() if event["event"] == "fault"]
