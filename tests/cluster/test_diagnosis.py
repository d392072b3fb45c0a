"""Who is to blame: the first error, not its cascade; the frozen rank, not those that wait for it."""

import signal

import pytest

from stagdist.cluster.supervision.diagnosis import SilenceLimits, find_exit, find_silence
from stagdist.cluster.supervision.rank_reports import RankReport
from stagdist.telemetry.pulse import Phase

LIMITS = SilenceLimits(hang_s=10.0, slow_s=100.0, host_s=20.0)
LOST = ("error: stage 0, rank 0, step 5: activations: the transfer failed; look for the first error of rank 1",)


def running(rank: int, *, phase: Phase = Phase.FORWARD, age_s: float = 0.0, heard_at: float = 100.0, process: str = "S",
            count: int = 5) -> RankReport:  # fmt: skip
    return RankReport(
        rank, f"node{rank}", step=4, phase=phase, count=count, age_s=age_s, heard_at=heard_at, process=process
    )


def ended(rank: int, code: int, at: float, tail: tuple[str, ...] = (), by_us: bool = False) -> RankReport:
    return RankReport(rank, f"node{rank}", step=4, exit_code=code, exited_at=at, tail=tail, ended_by_us=by_us)


def by_rank(*views: RankReport) -> dict[int, RankReport]:
    return {view.rank: view for view in views}


def test_a_healthy_attempt_has_no_fault() -> None:
    ranks = by_rank(running(0, age_s=5), ended(1, 0, 99.0))
    assert find_exit(ranks, 100.0) is None and find_silence(ranks, 100.0, LIMITS) is None


def test_a_killed_rank_is_named_and_not_the_one_that_lost_its_peer_a_moment_earlier() -> None:
    fault = find_exit(by_rank(ended(0, 1, 100.0, LOST), ended(1, -signal.SIGKILL, 100.4)), 100.0)
    assert fault is not None and (fault.rank, fault.code, fault.own) == (1, -9, False)
    assert fault.says == "rank 1 on node1 was killed by SIGKILL"


def test_a_lost_peer_whose_host_is_not_heard_is_the_one_to_blame() -> None:
    fault = find_exit(by_rank(ended(0, 1, 100.0, LOST), running(1, heard_at=94.0)), 100.0)
    assert fault is not None and (fault.kind, fault.rank, fault.host) == ("silent", 1, "node1") and "6 s" in fault.says


def test_of_two_errors_of_their_own_the_earlier_is_the_first() -> None:
    ranks = by_rank(ended(0, 1, 100.2, ("error: b",)), ended(1, 1, 100.1, ("note", "error: a", "noise")))
    fault = find_exit(ranks, 100.0)
    assert fault is not None and fault.says == "rank 1 on node1 ended with code 1: a" and fault.own


def test_of_an_error_that_all_meet_the_rank_that_speaks_is_shown() -> None:
    ranks = by_rank(ended(0, 1, 100.5, ("error: not finite",)), ended(1, 1, 100.0, ("[W1123] socket warning",)))
    fault = find_exit(ranks, 100.0)
    assert fault is not None and fault.rank == 0 and "not finite" in fault.says


def test_ranks_that_were_asked_to_end_are_no_first_error() -> None:
    assert find_exit(by_rank(ended(0, -9, 100.0, by_us=True)), 100.0) is None
    fault = find_exit(by_rank(ended(0, -signal.SIGTERM, 100.0), ended(1, 1, 100.5, ("error: x",))), 100.0)
    assert fault is not None and fault.rank == 1


def test_a_peer_that_gave_up_waiting_points_to_the_stopped_rank() -> None:
    ranks = by_rank(ended(0, 1, 100.0, ("error: another rank ended, or did not answer",)), running(1, process="T"))
    fault = find_exit(ranks, 100.0)
    assert fault is not None and (fault.kind, fault.rank) == ("stuck", 1)


def test_a_lost_peer_alone_is_still_told() -> None:
    fault = find_exit(by_rank(ended(0, 1, 100.0, LOST), running(1)), 100.0)
    assert fault is not None and fault.rank == 0 and not fault.own


@pytest.mark.parametrize("stuck", [{"process": "T", "phase": Phase.RECEIVE}, {"phase": Phase.FORWARD, "process": "R"}])
def test_the_stuck_rank_is_named_though_its_peers_fell_silent_earlier(stuck: dict[str, object]) -> None:
    waiting = running(0, phase=Phase.RECEIVE, age_s=12.0)
    ranks = by_rank(waiting, running(1, age_s=11.0, **stuck), running(2, phase=Phase.UPDATE, age_s=11.5))  # type: ignore[arg-type]
    fault = find_silence(ranks, 100.0, LIMITS)
    assert fault is not None and (fault.kind, fault.rank) == ("stuck", 1)


def test_the_stuck_rank_is_named_also_when_only_a_peer_is_over_the_limit() -> None:
    ranks = by_rank(running(0, phase=Phase.RECEIVE, age_s=10.5), running(1, age_s=9.0, process="T"))
    fault = find_silence(ranks, 100.0, LIMITS)
    assert fault is not None and fault.rank == 1


def test_slow_phases_and_ranks_without_signs_have_their_own_limits() -> None:
    assert find_silence(by_rank(running(0, phase=Phase.SAVE, age_s=50)), 100.0, LIMITS) is None
    assert find_silence(by_rank(running(0, phase=Phase.SAVE, age_s=101)), 100.0, LIMITS) is not None
    assert find_silence(by_rank(running(0, age_s=1e6, count=0)), 100.0, LIMITS) is None


def test_a_stopped_rank_is_stuck_also_where_silence_is_normal() -> None:
    saving = running(0, phase=Phase.SAVE, age_s=30, process="T")
    saving.stopped_at = 95.0
    assert find_silence(by_rank(saving), 100.0, LIMITS) is None
    saving.stopped_at = 89.0
    fault = find_silence(by_rank(saving), 100.0, LIMITS)
    assert fault is not None and (fault.kind, fault.rank) == ("stuck", 0)


def test_a_host_that_is_not_heard_is_silent_not_stuck() -> None:
    fault = find_silence(by_rank(running(0, age_s=30), running(1, heard_at=79.0)), 100.0, LIMITS)
    assert fault is not None and (fault.kind, fault.host, fault.rank) == ("silent", "node1", 1)


def test_the_same_error_again_is_recognised_whatever_its_numbers() -> None:
    first = find_exit(by_rank(ended(0, 1, 1.0, ("error: 0.3 GB are free",))), 100.0)
    again = find_exit(by_rank(ended(0, 1, 2.0, ("error: 0.1 GB are free",))), 100.0)
    other = find_exit(by_rank(ended(0, 1, 2.0, ("error: no such file",))), 100.0)
    assert first is not None and again is not None and other is not None
    assert first.same_again == again.same_again != other.same_again


def test_a_rank_that_its_watchdog_aborts_for_want_of_a_frozen_peer_is_not_to_blame() -> None:
    watchdog = (
        "[rank0]:[E] Watchdog caught collective operation timeout: WorkNCCL(OpType=RECV) ran for 10023 ms before "
        "timing out.",
        "frame #8: clone + 0x43 (0x7f)",
    )
    ranks = by_rank(ended(0, -signal.SIGABRT, 100.0, watchdog), running(1, process="T"))
    fault = find_exit(ranks, 100.0)
    assert fault is not None and (fault.kind, fault.rank) == ("stuck", 1)
    assert (fault := find_exit(by_rank(ended(0, -signal.SIGABRT, 100.0, ("double free",))), 100.0)) and fault.rank == 0


def test_a_rank_that_never_gave_a_sign_is_stuck_where_its_script_gives_signs() -> None:
    limits = SilenceLimits(hang_s=10.0, slow_s=100.0, host_s=20.0, start_s=50.0)
    frozen = by_rank(running(0, count=0, phase=Phase.START, age_s=60.0, process="T"), running(1, count=0, age_s=59.0))
    fault = find_silence(frozen, 100.0, limits)
    assert fault is not None and (fault.kind, fault.rank) == ("stuck", 0) and "phase start (stopped" in fault.says
    assert find_silence(frozen, 100.0, LIMITS) is None, "other scripts may be quiet"
    frozen[0].stopped_at = 89.0
    assert find_silence(frozen, 100.0, LIMITS) is not None, "but not stopped for longer than a hang"


def test_an_agent_that_is_gone_is_to_blame_for_the_peer_that_lost_it() -> None:
    lost = running(1, heard_at=99.8)
    lost.lost = True
    fault = find_exit(by_rank(ended(0, 1, 99.9, LOST), lost), 100.0)
    assert fault is not None and fault.says == "the agent of rank 1 on node1 is gone"
    fault = find_silence(by_rank(running(0), lost), 100.0, LIMITS)
    assert fault is not None and (fault.kind, fault.rank) == ("silent", 1)
