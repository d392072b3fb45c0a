"""An agent that nobody talks to any more ends its script, itself, and the launcher that waits for it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from stagdist.cluster.supervision.messages import Job, decode, encode

# Starts the agent as a launcher's daemon does, and then waits for a word that never comes.
DAEMON = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "stagdist.cluster.supervision.agent", "--job", sys.argv[1]])
time.sleep(60)
"""
SCRIPT = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"


class Daemon:
    """A launcher's daemon with one agent, and a supervisor that may welcome it but says nothing more."""

    def __init__(self, folder: Path, welcome: bool):
        (folder / "script.py").write_text(SCRIPT)
        self._welcome, self._folder = welcome, folder
        self._server = socket.create_server(("127.0.0.1", 0))

    def end(self) -> tuple[int, str]:
        """Exit code and complaints."""
        port = self._server.getsockname()[1]
        command = (str(self._folder / "script.py"), str(self._folder / "pid"))
        job = Job(command, str(self._folder), {}, "127.0.0.1", port, "token", 1, str(self._folder), lease_s=2.0)
        job.write(self._folder / "job.json")
        world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        words = [sys.executable, "-c", DAEMON, str(self._folder / "job.json")]
        with self._server, subprocess.Popen(words, env=os.environ | world, stderr=subprocess.PIPE, text=True) as daemon:
            try:
                connection, _ = self._server.accept()
                with connection:
                    assert decode(connection.recv(1 << 16).partition(b"\n")[0])["token"] == "token"
                    if self._welcome:
                        connection.sendall(encode({"kind": "welcome"}))
                        self._keep_alive(connection)
                    code = daemon.wait(30)
                assert daemon.stderr is not None
                return code, daemon.stderr.read()
            finally:
                daemon.kill()

    def _keep_alive(self, connection: socket.socket) -> None:
        """Until the script runs; then silence."""
        deadline = time.monotonic() + 30
        while not ((self._folder / "pid").exists() and (self._folder / "pid").read_text()):
            assert time.monotonic() < deadline, "no script"
            connection.sendall(encode({"kind": "ping"}))
            time.sleep(0.1)


def test_a_rank_behind_a_cut_link_ends_with_its_launcher(tmp_path: Path) -> None:
    code, said = Daemon(tmp_path, welcome=True).end()
    assert code == -15, "asked to end by its agent"
    assert "no word from the supervisor for 2 s" in said
    script = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 5
    while script.exists() and "\nState:\tZ" not in (script / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_script_does_not_start_before_the_supervisor_knows_of_it(tmp_path: Path) -> None:
    code, said = Daemon(tmp_path, welcome=False).end()
    assert code == -15 and "no word from the supervisor for 2 s: rank 0 ends" in said
    assert not (tmp_path / "pid").exists()
