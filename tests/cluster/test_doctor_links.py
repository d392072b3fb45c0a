"""Links: what ranks report, and a real measurement."""

import time

import pytest

from stagdist.cluster.doctor import examination, link_probe
from stagdist.cluster.doctor.examination import measure_links, read_links
from stagdist.cluster.doctor.facts import ALONE, LinkReport
from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.remote import Finished
from stagdist.errors import TransportError
from stagdist.parallel.grid import Grid
from tests.cluster.doctor_cases import facts, links
from tests.ranks import free_port, run_ranks

HERE = [Host(ALONE, 2)]


def test_every_host_starts_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {}

    def run(host: str, words: list[str], limit_s: float, **variables: str) -> Finished:
        started[host] = (words, limit_s, variables)
        return Finished(0, links(1).model_dump_json() if host == "node1" else "", "", 1.0)

    monkeypatch.setattr(examination, "run", run)
    known = {"node1": facts(1), "node2": facts(2)}
    hosts = [Host("node1", 3), Host("node2", 1)]
    assert measure_links(hosts, Grid(2, 2, 1), known, {"NCCL_DEBUG": "INFO"}, 100) == links(1)
    assert started["node2"][0][3:] == ["--start-s", "60", "--grid", "2", "2", "1", "--first-rank", "3", "--ranks", "1"]
    variables = {"NCCL_DEBUG": "INFO", "MASTER_ADDR": "node1", "MASTER_PORT": "23456"}
    assert started["node1"][1:] == started["node2"][1:] == (100, variables)


def test_the_result_is_found_among_other_lines() -> None:
    measured = links(200)
    text = f"Welcome to node1!\n[Gloo] Rank 0 is connected\n{measured.model_dump_json()}\n"
    assert read_links({"node1": Finished(0, text, "", 1.0), "node2": Finished(0, "Welcome!\n", "", 1.0)}) == measured


CLOSED = "rank 3 on n2: RuntimeError: Connection closed by peer\nrank 1 on n1: ConfigError: no device\n"


@pytest.mark.parametrize(
    ("ended", "complaint"),
    [
        (Finished(None, "", "", 180.0), "did not end within the time limit"),
        (Finished(124, "", "", 180.0), "did not end within the time limit"),
        (Finished(255, "", "ssh: connect to host node2 port 22: timed out\n", 1.0), "ranks on node2 failed: ssh: conn"),
        (Finished(1, "", CLOSED, 1.0), "2 ranks failed, the first: rank 1 on n1: ConfigError: no device"),
    ],
)
def test_a_failure_is_told_by_its_cause(ended: Finished, complaint: str) -> None:
    with pytest.raises(TransportError, match=complaint):
        read_links({"node1": Finished(0, "", "", 1.0), "node2": ended})


def test_silent_hosts_are_not_measured() -> None:
    with pytest.raises(TransportError, match="node2 did not answer"):
        measure_links([Host("node1", 1), Host("node2", 1)], Grid(2, 1, 1), {"node1": facts()}, {}, 1)


@pytest.mark.ranks
def test_ranks_that_fail_are_told_at_once() -> None:
    here = {ALONE: facts(port=free_port())}
    started = time.monotonic()
    with pytest.raises(TransportError, match="the first: rank [01] on .*: ConfigError: .*/nowhere cannot be read"):
        measure_links(HERE, Grid(2, 1, 1), here, {"STAGDIST_PRIVATE_ENV": "/nowhere"}, 150)
    assert time.monotonic() - started < 60


@pytest.mark.ranks
def test_ranks_that_do_not_meet_end_at_the_time_limit() -> None:
    here = {ALONE: facts(port=free_port())}
    with pytest.raises(TransportError, match="did not end within the time limit|processes did not meet"):
        measure_links(HERE, Grid(3, 1, 1), here, {}, 4)


def measure_four(payload: tuple[int, int, int]) -> LinkReport | None:
    from stagdist.parallel.world import join_launcher

    return link_probe.measure(Grid(*payload), join_launcher(), 60.0)


@pytest.mark.ranks
def test_every_boundary_and_every_group_is_measured_once() -> None:
    first, *others = run_ranks("tests.cluster.test_doctor_links:measure_four", 4, (2, 2, 1))
    assert others == [None, None, None]
    assert sorted((one.axis, one.ranks) for one in first.links) == [
        ("all", (0, 1, 2, 3)), ("data", (0, 1)), ("data", (2, 3)), ("pipe", (0, 2)), ("pipe", (1, 3)),
    ]  # fmt: skip
    assert all(one.correct and one.bytes_s > 0 for one in first.links)


def test_no_rank_is_in_two_groups_of_a_round() -> None:
    assert link_probe.rounds(Grid(4, 2, 1)) == [
        ("pipe", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("pipe", [[2, 4], [3, 5]]),
        ("data", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("all", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ]
    for sizes in ((1, 1, 2), (2, 1, 1), (3, 2, 2), (5, 1, 3)):
        for _, groups in link_probe.rounds(Grid(*sizes)):
            members = [rank for ranks in groups for rank in ranks]
            assert len(set(members)) == len(members)
