"""The supervisor before any rank was started: while it waits for a host, and where it cannot start."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.ranks import run_script

RUN = Path(__file__).resolve().parents[2] / "launch" / "run.py"
# 127.0.0.9 is this machine, where nobody lets us in without a question.
ON_HOSTS = ("--hostfile", "hostfile", "--folder", "run", "--host-timeout-s", "3")


def test_a_signal_ends_the_wait_for_a_host_that_never_answered(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("127.0.0.9 slots=1\n")
    (tmp_path / "script.py").write_text("")
    words = [*ON_HOSTS, "--host-wait-s", "200", "--", "script.py"]
    with subprocess.Popen(
        [sys.executable, str(RUN), *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    ) as process:
        assert process.stderr is not None
        try:
            said = ""
            while "waiting up to 200 s for 127.0.0.9" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=90)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT, rest
    assert "SIGINT: no ranks are at work; ending" in rest and "SIGINT: before any rank was started" in rest
    assert "attempt" not in rest and "error" not in rest
    events = json.loads((tmp_path / "run" / "run.json").read_text())["events"]
    assert [event["event"] for event in events] == ["stop"] and events[0]["code"] == 130


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("")
    (tmp_path / "file").write_text("")
    words = ["--folder", "file/run", "--", "script.py"]
    with contextlib.chdir(tmp_path):
        done = run_script(RUN, *words)
    assert done.returncode == 2
    problem = f"error: folder {tmp_path}/file/run cannot be written or locked: Not a directory; "
    assert done.stderr == problem + "choose another runs_directory or --folder\n"


def test_more_replicas_than_the_run_has_are_refused(tmp_path: Path) -> None:
    config = RUN.parents[1] / "configs" / "quickstart.yaml"
    words = ["--min-data-parallel", "2", "--", str(RUN.parent / "pretrain.py"), "--config", str(config)]
    with contextlib.chdir(tmp_path):
        done = run_script(RUN, *words)
    assert done.returncode == 2 and done.stderr == "error: --min-data-parallel 2 is more than the run has: data 1\n"


def test_a_spare_that_can_replace_no_host_is_told(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("127.0.0.9 slots=2\n#spare small slots=1\n#spare big slots=2\n")
    (tmp_path / "script.py").write_text("")
    words = [*ON_HOSTS, "--host-wait-s", "0", "--", "script.py"]
    with contextlib.chdir(tmp_path):
        done = run_script(RUN, *words)
    assert done.returncode == 1 and "127.0.0.9 did not come back within 0 s" in done.stderr
    assert "spare small has 1 slots, fewer than any host: it will never be used" in done.stderr
    assert "spare big has" not in done.stderr


def test_a_host_that_nobody_knows_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("nobody.invalid slots=1\n#spare other slots=1\n")
    (tmp_path / "script.py").write_text("")
    words = [*ON_HOSTS, "--", "script.py"]
    with contextlib.chdir(tmp_path):
        done = run_script(RUN, *words)
    assert done.returncode == 2 and "no address is known for nobody.invalid" in done.stderr.splitlines()[-1]
