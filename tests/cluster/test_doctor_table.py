"""The report: what differs is marked, many hosts are told in few words, and the verdict closes it."""

import dataclasses

from stagdist.cluster.doctor.findings import findings
from stagdist.cluster.doctor.report import host_table, link_table, report
from tests.cluster.doctor_cases import STORAGE, VERSIONS, boundary, facts, links, survey


def line(text: str, name: str) -> str:
    (found,) = [one for one in text.splitlines() if one.startswith(name)]
    return found


def test_hosts_are_columns_and_what_differs_is_marked() -> None:
    results = survey(3, {"node2": facts(2, 3, versions=VERSIONS | {"python": "3.12.1"})})
    text = host_table(results, findings(results))
    assert text.splitlines()[0].split() == ["node1", "node2", "node3"]
    assert line(text, "python").split() == ["python", "3.11.7", "!", "3.12.1", "3.11.7"]
    assert "!" not in line(text, "torch")
    assert line(text, "devices").count("2 x H100 80 GiB") == 3
    assert line(text, "shared").split() == ["shared", "yes", "yes", "yes"]


def test_many_hosts_are_told_by_what_most_have_and_who_differs() -> None:
    slow = dataclasses.replace(STORAGE, write_mb_s=12.0)
    results = survey(
        60, {"node7": facts(7, 60, versions=VERSIONS | {"python": "3.12.1"}), "node9": facts(9, 60, storage=slow)}
    )
    text = host_table(results, findings(results))
    assert max(len(one) for one in text.splitlines()) < 120
    assert line(text, "python").split(maxsplit=1)[1] == "! 3.11.7, but 3.12.1 (node7)"
    assert line(text, "write speed").split(maxsplit=2)[2] == "! 12 MB/s (node9) .. 900 MB/s (node1)"
    assert line(text, "torch").split() == ["torch", "2.13.0"]


def test_a_silent_host_keeps_its_column() -> None:
    results = survey(links=None, silent={"node2": "does not answer ssh"}, links_problem="node2 did not answer")
    results = results.model_copy(update={"facts": {"node1": results.facts["node1"]}})
    text = host_table(results, findings(results))
    assert line(text, "answers").split() == ["answers", "yes", "!", "NO"]
    assert line(text, "torch").split() == ["torch", "2.13.0", "-"]


def test_links_are_told_by_their_slowest_pair_and_slow_ones_are_marked() -> None:
    text = link_table(links())
    assert line(text, "  stage 0 -> 1").endswith("slowest of 4")
    assert "0.03 ms" in text and "11000 MB/s" in text
    assert "6000 MB/s" in line(text, "  all-reduce, all")
    slow = (*(boundary(rank, rank + 4) for rank in range(3)), boundary(3, 7, 3e-5, 1e9))
    assert "3 (node1) -> 7 (node2)" in line(link_table(links(boundaries=slow)), "! stage 0 -> 1")


def test_the_verdict_closes_the_report() -> None:
    well = survey()
    assert report(well, findings(well)).endswith("\nverdict: fine\n")
    ill = survey(2, {"node2": facts(2, versions=VERSIONS | {"python": "3.12.1"})})
    text = report(ill, findings(ill))
    assert "problem: node2: python is 3.12.1" in text
    assert text.endswith("\nverdict: 1 problem to fix before a long run\n")
