"""Signs of life reach a watcher in another process, whole and with their age."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from stagdist.telemetry.pulse import DUMP_SIGNAL, PULSE_FILE, Phase, Pulse, PulseReader, stack_lines

WRITER = """
import sys, time
from stagdist.telemetry.pulse import Phase, Pulse
pulse = Pulse.from_environment()
until = time.monotonic() + float(sys.argv[1])
step = 7
while time.monotonic() < until:
    pulse.beat(Phase.STEP, step)
    step += 1
print("done", flush=True)
time.sleep(60)
"""


def writer(path: Path, seconds: float) -> "subprocess.Popen[str]":
    environment = {**os.environ, PULSE_FILE: str(path)}
    words = [sys.executable, "-c", WRITER, str(seconds)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_a_watcher_nothing_is_written(tmp_path: Path) -> None:
    Pulse.from_environment({}).beat(Phase.STEP, 3)
    assert not list(tmp_path.iterdir())


def test_a_watcher_sees_first_step_latest_step_phase_and_age(tmp_path: Path) -> None:
    reader = PulseReader(tmp_path / "pulse")
    assert reader.read().count == 0 and reader.read().step == -1
    pulse = Pulse(tmp_path / "pulse")
    pulse.beat(Phase.STEP, 20)
    pulse.beat(Phase.STEP, 21)
    pulse.beat(Phase.RECEIVE)
    time.sleep(0.2)
    sign = reader.read()
    assert (sign.count, sign.first_step, sign.step, sign.phase) == (3, 20, 21, Phase.RECEIVE)
    assert 0.2 <= sign.age_s < 5


def test_signs_are_whole_while_another_process_writes_them(tmp_path: Path) -> None:
    reader = PulseReader(tmp_path / "pulse")
    with writer(tmp_path / "pulse", 1.5) as process:
        try:
            while reader.read().count < 2:
                time.sleep(0.01)
            until, last = time.monotonic() + 1, 0
            while time.monotonic() < until:
                sign = reader.read()
                # Every step has one sign after that of the start, so a torn one would show.
                assert sign.step - 7 == sign.count - 2 and sign.age_s < 5 and sign.count >= last
                last = sign.count
            assert last > 1000
        finally:
            process.kill()


def test_a_rank_with_a_pulse_shows_its_stacks_on_a_signal_and_goes_on(tmp_path: Path) -> None:
    reader = PulseReader(tmp_path / "pulse")
    with writer(tmp_path / "pulse", 0.2) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "done\n" and reader.read().count
        process.send_signal(DUMP_SIGNAL)
        stack = [process.stderr.readline().rstrip("\n") for _ in range(2)]
        # It may not have come from the line that prints to the one that sleeps.
        assert "most recent call first" in stack[0] and re.match(r'  File "<string>", line 1[01] in', stack[1]), stack
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert stack_lines(["step 7/9  loss 2.3", *stack, "saved", "File a.txt"]) == stack
