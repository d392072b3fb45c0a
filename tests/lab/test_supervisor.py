"""Supervised runs over several hosts: a handful of faults, what can be seen of secrets, and who listens where.

All faults: `make faults`.
"""

import ipaddress
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.drill import Drill, problems, supervised_config
from tests.lab.faults import FAULTS
from tests.lab.hosts import Lab
from tests.lab.supervised import TERM, Supervised

pytestmark = pytest.mark.lab
NAMED = {fault.name: fault for fault in FAULTS}
SECRET = "s3cret-value-that-nobody-may-see"
NASTY = "it's a $(touch /var/tmp/stagdist-hit) `touch /var/tmp/stagdist-hit`; touch /var/tmp/stagdist-hit"

LocalLosses = Callable[[str], dict[int, float]]


@pytest.mark.parametrize(
    "fault",
    [
        "srun_kill_rank_1",
        # In `make test`, tests/launch/test_run.py and tests/cluster/test_placement.py check the same decisions, and the
        # test of secrets starts a run by ssh.
        pytest.param("kill_rank_1", marks=pytest.mark.slow),
        pytest.param("power_off_spare", marks=pytest.mark.slow),
        pytest.param("sigkill_supervisor", marks=pytest.mark.slow),
        pytest.param("srun_is_killed", marks=pytest.mark.slow),
    ],
)
def test_a_run_survives_or_ends_in_order(
    clean_lab: Lab, lab_corpus: Path, supervised_losses: LocalLosses, tmp_path: Path, fault: str
) -> None:
    reference = {grid: supervised_losses(grid) for grid in ("pipe2",)}
    entry = Drill(clean_lab, NAMED[fault], tmp_path, lab_corpus, reference).measure()
    assert problems(NAMED[fault], entry) == [], entry


def test_secrets_are_seen_nowhere_values_run_nothing_and_sockets_listen_where_they_must(
    clean_lab: Lab, lab_corpus: Path, tmp_path: Path
) -> None:
    variables = {"WANDB_API_KEY": SECRET, "WANDB_NOTES": NASTY, "PYTHONDONTWRITEBYTECODE": "1", "NCCL_NASTY": NASTY}
    run = Supervised(clean_lab, tmp_path, options=("--max-restarts", "0"), variables=variables)
    run.start(supervised_config(lab_corpus, "pipe2", steps=3000))
    run.wait_for_step(5)
    scripts = run.scripts()
    assert sorted(scripts) == [0, 1]
    for script in scripts.values():
        assert script.environment["WANDB_API_KEY"] == SECRET, "it reaches the ranks"
        assert script.environment["WANDB_NOTES"] == NASTY and script.environment["NCCL_NASTY"] == NASTY
    for process in clean_lab.processes():
        assert SECRET not in " ".join(process.command)
    for host in clean_lab.hosts:
        addresses = listening(clean_lab, host)
        assert addresses or host not in run.hosts, f"nothing listens on {host}, where ranks run"
        for address in addresses:
            assert address.is_loopback or str(address) == clean_lab.address(host), f"{host} listens on {address}"
    assert run.call.poll() is None and sorted(run.scripts()) == [0, 1], "it was looked at while it ran"
    run.signal_supervisor(TERM)
    assert run.call.wait(120) == 128 + TERM, run.call.text()
    assert not Path("/var/tmp/stagdist-hit").exists()
    readable = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert readable == [], "what held it is gone"
    assert SECRET not in run.call.text()


def listening(lab: Lab, host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses on which programs of a host wait for connections, its ssh server apart."""
    code, text = lab.run(host, ["ss", "-Hltn"])
    assert code == 0, text
    places = [line.split()[3].rpartition(":") for line in text.splitlines() if line.startswith("LISTEN")]
    addresses = [(place.strip("[]").partition("%")[0].replace("*", "0.0.0.0"), port) for place, _, port in places]
    return [ipaddress.ip_address(address) for address, port in addresses if port != "22"]
