"""What the supervisor does about leftovers, lost steps and its own pauses."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.supervision import supervisor
from stagdist.cluster.supervision.attempt import AttemptResult
from stagdist.cluster.supervision.diagnosis import Fault, SilenceLimits, find_silence
from stagdist.cluster.supervision.host_agents import AgentStart, HostAgents
from stagdist.cluster.supervision.options import SupervisorOptions
from stagdist.cluster.supervision.placement import HostPlacement, refuse_unusable
from stagdist.cluster.supervision.rank_reports import RankReport
from stagdist.cluster.supervision.supervisor import GaveUpError, Supervisor
from stagdist.errors import ConfigError

LIMITS = SilenceLimits(hang_s=10.0, slow_s=100.0, host_s=10.0)


def made(folder: Path, environment: Mapping[str, str] = MappingProxyType({}), *, serves: bool = False) -> Supervisor:
    placement = HostPlacement((Host("a", 1), Host("b", 2)), (Host("spare", 1),))
    options = SupervisorOptions(
        ("x.py",), "ssh", placement, folder, environment, 9, LIMITS, 15.0, 1.0, 1.0, None, serves=serves
    )
    return Supervisor(options, print)


def test_an_earlier_start_is_cleared_from_spares_too_and_one_that_is_off_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    async def clear(agents: Mapping[str, AgentStart]) -> tuple[int, dict[str, str]]:
        asked.append(list(agents))
        return 1, {"spare": "off"}

    async def attempt(_: Supervisor) -> AttemptResult:
        return AttemptResult(None, {}, 0.0, [], 0.0)

    monkeypatch.setattr(supervisor, "clear", clear)
    monkeypatch.setattr(Supervisor, "_attempt", attempt)
    one = made(tmp_path)
    assert asyncio.run(one.run()) == 0
    assert asked[0] == ["a", "b", "spare"]
    assert [event["event"] for event in one._history._body["events"]][:1] == ["cleared"]


def test_every_rank_gets_its_place_and_nothing_of_it_is_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "address_of", lambda hosts: "10.0.0.1")
    one = made(tmp_path, {"WANDB_API_KEY": "s3cret", "NCCL_NASTY": "$(touch hit)"})
    starts = one._agents()
    assert [list(start.job.ranks) for start in starts.values()] == [[0], [1, 2]]
    for start in starts.values():
        variables = start.job.environment
        assert (variables["MASTER_ADDR"], variables["WORLD_SIZE"]) == ("10.0.0.1", "3")
        assert variables["LOCAL_WORLD_SIZE"] == str(start.job.slots)
        assert int(variables["MASTER_PORT"]) in supervisor.PORTS and variables["WANDB_API_KEY"] == "s3cret"
        assert "s3cret" not in str(start.command.words) and "touch" not in str(start.command.words)
    assert len({start.job.environment["MASTER_PORT"] for start in starts.values()}) == 1


def test_steps_lost_are_counted_from_the_last_training_also_after_an_attempt_that_never_trained(tmp_path: Path) -> None:
    one = made(tmp_path)
    one._on_step(30)
    one._check_hope(Fault("exit", 0, "a", "rank 0 on a was killed", -9, step=33))
    one._check_hope(Fault("missing", 1, "b", "rank 1 could not be started on b", step=-1))
    one._first_known = None
    one._on_step(30)
    assert one._history._body["events"][-1]["lost_steps"] == 3


def test_time_in_which_the_supervisor_was_stopped_is_nobodys_silence() -> None:
    agents, now = HostAgents({}, print), time.monotonic()
    agents.ranks[0] = RankReport(0, "a", count=1, heard_at=now - 12.0)
    assert find_silence(agents.ranks, now, LIMITS) is not None
    agents.extend_deadlines(12.0)
    assert find_silence(agents.ranks, now, LIMITS) is None


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


@pytest.mark.parametrize(
    ("answers", "hosts"),
    [
        ([{"spare": "off"}, {"b": "off", "spare": "off"}, {"b": "off"}], ["a", "spare"]),
        ([{"spare": "off"}, {"spare": "off"}], ["a", "b"]),
        ([{}], ["a", "spare"]),
    ],
    ids=["a spare that is back", "the host itself", "a spare at once"],
)
def test_while_a_host_is_waited_for_it_or_a_spare_may_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, str]], hosts: list[str]
) -> None:
    asked: list[list[str]] = []

    async def clear(agents: Mapping[str, AgentStart]) -> tuple[int, dict[str, str]]:
        asked.append(list(agents))
        return 0, answers[len(asked) - 1]

    monkeypatch.setattr(supervisor, "clear", clear)
    monkeypatch.setattr(supervisor, "PROBE_S", 0.01)
    one = made(tmp_path)
    one._placement = HostPlacement((Host("a", 1), Host("b", 1)), (Host("spare", 1),))

    async def replace() -> None:
        one._stop = asyncio.Event()
        await one._replace_dead({"b": "off"}, time.monotonic() - 100.0)

    asyncio.run(replace())
    assert [host.name for host in one._placement.hosts] == hosts
    assert asked[0] == ["spare"] and all(names == ["b", "spare"] for names in asked[1:]), "b did not answer just now"


def test_a_server_that_served_is_started_again_however_often_and_one_that_never_did_is_given_up(tmp_path: Path) -> None:
    one = made(tmp_path, serves=True)
    fault = Fault("exit", 0, "a", "rank 0 on a ended with code 1: the HTTP process has ended", 1, step=0, own=True)
    for _ in range(20):
        one._first_known = None
        one._on_step(0)
        one._check_hope(fault)
        one._restarts += 1
    one._first_known = None
    with pytest.raises(GaveUpError, match="the same as the time before"):
        one._check_hope(fault)
    trains = made(tmp_path)
    trains._on_step(0)
    trains._check_hope(fault)
    with pytest.raises(GaveUpError, match="the same as the time before"):
        trains._check_hope(fault)


def test_what_serves_between_attempts_is_kept_on_the_host_of_rank_0_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, bool]] = []

    async def clear(agents: Mapping[str, AgentStart]) -> tuple[int, dict[str, str]]:
        asked.append({host: start.job.keep_service for host, start in agents.items()})
        return 0, {}

    results = [Fault("silent", 0, "a", "nothing was heard from rank 0 on a", step=0), None]

    async def attempt(one: Supervisor) -> AttemptResult:
        return AttemptResult(results.pop(0), {}, 0.0, ["a", "b"], 0.0)

    monkeypatch.setattr(supervisor, "clear", clear)
    monkeypatch.setattr(supervisor, "address_of", lambda hosts: "10.0.0.1")
    monkeypatch.setattr(Supervisor, "_attempt", attempt)
    one = made(tmp_path, serves=True)
    assert [start.job.keep_service for start in one._agents().values()] == [True, False]
    assert asyncio.run(one.run()) == 0
    kept = {"a": True, "b": False}
    assert asked == [{"a": False, "b": False, "spare": False}, kept, kept, {"a": False}]
