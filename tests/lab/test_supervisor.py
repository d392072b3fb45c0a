"""Supervised runs over several hosts: a handful of faults, what can be seen of secrets, and who listens where.

All faults: `make faults`.
"""

import ipaddress
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.drill import Drill, problems, supervised_config
from tests.lab.faults import FAULTS
from tests.lab.hosts import Lab
from tests.lab.supervised import KILL, TERM, Supervised

pytestmark = pytest.mark.lab
NAMED = {fault.name: fault for fault in FAULTS}
SECRET = "s3cret-value-that-nobody-may-see"
NASTY = "it's a $(touch /var/tmp/stagdist-hit) `touch /var/tmp/stagdist-hit`; touch /var/tmp/stagdist-hit"

LocalLosses = Callable[[str], dict[int, float]]


@pytest.mark.slow  # the test below starts training ranks again by ssh, the one after it ranks that srun has started
@pytest.mark.parametrize(
    "fault", ["srun_kill_rank_1", "kill_rank_1", "power_off_spare", "sigkill_supervisor", "srun_is_killed"]
)
def test_a_run_survives_or_ends_in_order(
    clean_lab: Lab, lab_corpus: Path, supervised_losses: LocalLosses, tmp_path: Path, fault: str
) -> None:
    reference = {grid: supervised_losses(grid) for grid in ("pipe2",)}
    entry = Drill(clean_lab, NAMED[fault], tmp_path, lab_corpus, reference).measure()
    assert problems(NAMED[fault], entry) == [], entry


def test_secrets_are_seen_nowhere_sockets_listen_where_they_must_and_a_killed_rank_is_started_again(
    clean_lab: Lab, lab_corpus: Path, tmp_path: Path
) -> None:
    variables = {"WANDB_API_KEY": SECRET, "WANDB_NOTES": NASTY, "PYTHONDONTWRITEBYTECODE": "1", "NCCL_NASTY": NASTY}
    run = Supervised(clean_lab, tmp_path, options=("--max-restarts", "1"), variables=variables)
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
    kill_and_wait(run)
    run.signal_supervisor(TERM)
    assert run.call.wait(120) == 128 + TERM, run.call.text()
    assert not Path("/var/tmp/stagdist-hit").exists()
    readable = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert readable == [], "what held it is gone"
    assert SECRET not in run.call.text() and run.orphans(2.0) == []


def kill_and_wait(run: Supervised) -> None:
    """Kill rank 1; the run resumes from its newest checkpoint, and repeats the steps behind it with the same losses."""
    run.wait_until(lambda: run.newest_checkpoint() > 0, "checkpoint", 120)
    newest, planted = run.newest_checkpoint(), time.time()
    run.signal_script(1, KILL)
    fault = run.wait_for_event("fault")
    assert (fault["kind"], fault["rank"]) == ("exit", 1) and fault["noticed"] - planted < 5, fault
    before = run.losses()
    resumed = run.wait_for_event("resume", 2)["step"]
    assert newest <= resumed <= max(before)
    last = max(before)
    run.wait_until(lambda: max(run.losses()) > last, f"step {last + 1}", 120)
    after = run.losses()
    assert set(after) >= set(before) and {step: after[step] for step in before} == before  # to the last bit


STEPS = """
import os, sys, time
from pathlib import Path
from stagdist.telemetry.pulse import Phase, Pulse
pulse, rank, folder = Pulse.from_environment(), os.environ["RANK"], Path(sys.argv[-1]).parent
again = (folder / f"started-{rank}").exists()
(folder / f"started-{rank}").touch()
for step in range(10 if again else 10_000):
    pulse.beat(Phase.STEP, step)
    (folder / f"steps-{rank}").touch()
    time.sleep(0.02)
"""


def test_ranks_that_srun_has_started_are_started_again(clean_lab: Lab, lab_corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STEPS)
    options = ("--folder", str(tmp_path / "runs" / "run"))
    run = Supervised(clean_lab, tmp_path, "srun", options=options, script=script)
    run.start(supervised_config(lab_corpus, "pipe2"))
    run.wait_until(lambda: all((tmp_path / f"steps-{rank}").exists() for rank in (0, 1)), "step of both ranks", 120)
    scripts, planted = run.scripts(), time.time()
    assert {rank: one.host for rank, one in scripts.items()} == {0: "node1", 1: "node2"}
    scripts[1].signal(KILL)
    assert run.call.wait(120) == 0, run.call.text()
    (fault,) = run.events("fault")
    assert (fault["kind"], fault["rank"]) == ("exit", 1) and fault["noticed"] - planted < 5, fault
    assert len(run.events("resume")) == 2 and run.orphans(2.0) == []


def listening(lab: Lab, host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses on which programs of a host wait for connections, its ssh server apart."""
    code, text = lab.run(host, ["ss", "-Hltn"])
    assert code == 0, text
    places = [line.split()[3].rpartition(":") for line in text.splitlines() if line.startswith("LISTEN")]
    addresses = [(place.strip("[]").partition("%")[0].replace("*", "0.0.0.0"), port) for place, _, port in places]
    return [ipaddress.ip_address(address) for address, port in addresses if port != "22"]
