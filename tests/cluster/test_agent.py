"""An agent that nobody talks to any more ends its script, itself, and the launcher that waits for it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from stagdist.cluster.job import Job

# Starts the agent as a launcher's daemon does, and then waits for a word that never comes.
DAEMON = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "stagdist.cluster.agent", "--job", sys.argv[1]])
time.sleep(60)
"""
SCRIPT = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"


def test_a_rank_behind_a_cut_link_ends_with_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        port = silent.getsockname()[1]
        command = (str(tmp_path / "script.py"), str(tmp_path / "pid"))
        job = Job(command, str(tmp_path), {}, "127.0.0.1", port, "token", 1, str(tmp_path), lease_s=2.0)
        job.write(tmp_path / "job.json")
        world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        words = [sys.executable, "-c", DAEMON, str(tmp_path / "job.json")]
        with subprocess.Popen(words, env=os.environ | world, stderr=subprocess.PIPE, text=True) as daemon:
            try:
                assert daemon.wait(30) == -15, "asked to end by its agent"
                assert daemon.stderr is not None and "no word from the supervisor for 2 s" in daemon.stderr.read()
            finally:
                daemon.kill()
    script = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 5
    while script.exists() and "\nState:\tZ" not in (script / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
