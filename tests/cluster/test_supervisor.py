"""What the supervisor does about leftovers, lost steps and its own pauses."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.supervision import supervisor
from stagdist.cluster.supervision.diagnosis import Fault, SilenceLimits, find_silence
from stagdist.cluster.supervision.options import SupervisorOptions
from stagdist.cluster.supervision.placement import HostPlacement, refuse_unusable
from stagdist.cluster.supervision.rank_reports import RankReport, RankServer
from stagdist.cluster.supervision.supervisor import GaveUpError, Supervisor
from stagdist.errors import ConfigError

LIMITS = SilenceLimits(hang_s=10.0, slow_s=100.0, host_s=10.0)


def made(folder: Path) -> Supervisor:
    placement = HostPlacement((Host("a", 1), Host("b", 1)), (Host("spare", 1),))
    return Supervisor(
        SupervisorOptions(("x.py",), "pdsh", placement, folder, {}, None, 9, LIMITS, 15.0, 1.0, 1.0, None), print
    )


def test_an_earlier_start_is_cleared_from_spares_too_and_its_secrets_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[str] = []

    def sweep(_: Any, hosts: tuple[Host, ...], *__: Any) -> tuple[int, int, dict[str, str]]:
        swept.extend(host.name for host in hosts)
        return 0, 0, {"b": "off", "spare": "off"}

    monkeypatch.setattr(supervisor, "sweep", sweep)
    job = tmp_path / "logs" / "attempt_001" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text("secret")
    dead = asyncio.run(made(tmp_path)._clear_earlier())
    assert swept == ["a", "b", "spare"] and dict(dead) == {"b": "off"}, "a spare that is off is no fault"
    assert not job.exists()


def test_steps_lost_are_counted_from_the_last_training_also_after_an_attempt_that_never_trained(tmp_path: Path) -> None:
    one = made(tmp_path)
    one._on_step(30)
    one._check_hope(Fault("exit", 0, "a", "rank 0 on a was killed", -9, step=33))
    one._check_hope(Fault("launcher", None, "", "the launcher ended", 1, step=-1))
    one._first_known = None
    one._on_step(30)
    assert one._history._body["events"][-1]["lost_steps"] == 3


def test_time_in_which_the_supervisor_was_stopped_is_nobodys_silence() -> None:
    server, now = RankServer("token", 1, print), time.monotonic()
    server.ranks[0] = RankReport(0, "a", count=1, heard_at=now - 12.0)
    assert find_silence(server.ranks, now, LIMITS) is not None
    server.extend_deadlines(12.0)
    assert find_silence(server.ranks, now, LIMITS) is None


def test_restarts_count_in_a_row_without_a_new_checkpoint(tmp_path: Path) -> None:
    one = made(tmp_path)
    for resumed, restarts in ((0, 0), (10, 0), (10, 1), (10, 2), (20, 0)):
        one._first_known = None
        one._on_step(resumed)
        assert one._restarts == restarts
        one._restarts += 1
    one._restarts = 9
    with pytest.raises(GaveUpError, match="--max-restarts 9"):
        one._check_hope(Fault("exit", 0, "a", "was killed", -9))


@pytest.mark.parametrize(
    ("reason", "refused"),
    [
        ("ssh: Could not resolve hostname b: Name or service not known", True),
        ("/runs/x/supervisor.lock is not there: the file system that all hosts share is not mounted", True),
        ("ssh: connect to host b port 22: Connection timed out", False),
    ],
)
def test_an_unknown_name_and_a_folder_of_its_own_are_refused_and_a_host_that_is_off_is_not(
    reason: str, refused: bool
) -> None:
    if refused:
        with pytest.raises(ConfigError, match=r"no address is known for b .*correct the hostfile|b: .*all hosts see"):
            refuse_unusable({"b": reason})
    else:
        refuse_unusable({"b": reason})
