"""A server over two hosts: rank 0 moves to a spare when its host is cut off, and nothing serves on the old one."""

import sys
import time
from pathlib import Path

import pytest

from stagdist.cluster.hosts.hostfile import Host
from tests.lab.hosts import Lab
from tests.lab.inside import Call
from tests.lab.launching import BIN, VARIABLES, hostfile_text
from tests.launch.generating import write_model
from tests.launch.runs import ROOT
from tests.launch.serving import SERVE

# In `make test`, tests/launch/test_serving_faults.py and tests/cluster/test_supervisor.py check the same decisions.
pytestmark = [pytest.mark.lab, pytest.mark.slow]

PORT = 8000
ASK = f"""
import urllib.error, urllib.request
try:
    print(urllib.request.urlopen("http://127.0.0.1:{PORT}/health", timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("nothing")
"""


def health(lab: Lab, host: str) -> str:
    """Status of /health on a host, or `nothing`."""
    return lab.run(host, [sys.executable, "-S", "-c", ASK])[1].strip()


def wait_for(lab: Lab, call: Call, host: str, status: str, limit_s: float) -> None:
    """Until /health of a host is so."""
    deadline = time.monotonic() + limit_s
    while (found := health(lab, host)) != status:
        assert call.poll() is None and time.monotonic() < deadline, f"{host}: {found}\n{call.text()}"
        time.sleep(0.3)


def test_rank_0_moves_to_a_spare_and_its_old_host_stops_to_listen(clean_lab: Lab, tmp_path: Path) -> None:
    spare = clean_lab.add_host()
    model, hostfile = write_model(tmp_path / "model"), tmp_path / "hostfile"
    hostfile.write_text(hostfile_text([Host("node2", 1), Host("node1", 1)]) + f"#spare {spare} slots=1\n")
    words = [sys.executable, str(ROOT / "launch" / "run.py"), "--hostfile", str(hostfile), "--start-with", "ssh"]
    words += ["--host-timeout-s", "4", "--folder", str(tmp_path / "run"), "--", str(SERVE), "--model", str(model)]
    words += ["--port", str(PORT), "--device", "cpu", "--timeout", "10", "--restart-timeout-s", "20"]
    shell = {**VARIABLES, "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT)}
    call = clean_lab.popen("node1", words, env=shell, cwd=tmp_path)
    wait_for(clean_lab, call, "node2", "200", 90)
    assert health(clean_lab, "node1") == health(clean_lab, spare) == "nothing"
    clean_lab.cut("node2")
    wait_for(clean_lab, call, "node2", "503", 30)
    wait_for(clean_lab, call, spare, "200", 90)
    wait_for(clean_lab, call, "node2", "nothing", 40)
    assert (tmp_path / "run" / "logs" / "http.node2.log").exists()
    clean_lab.signal(call, 15)
    assert call.wait(60) == 143, call.text()
    assert health(clean_lab, spare) == "nothing" and "the ranks have shut down cleanly" in call.text()
    assert [one for one in clean_lab.processes() if "http_process" in " ".join(one.command)] == []
