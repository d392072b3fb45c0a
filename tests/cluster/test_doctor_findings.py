"""From made-up results of an examination to findings: each fault is found on its host, and health is silent."""

import dataclasses
from typing import Any

import pytest

from stagdist.cluster.doctor.facts import NOTE, PROBLEM, Accelerator, Finding, HostFacts, Link
from stagdist.cluster.doctor.findings import findings
from tests.cluster.doctor_cases import STORAGE, VERSIONS, boundary, facts, links, survey


def test_healthy_hosts_give_no_finding() -> None:
    assert findings(survey()) == []
    assert findings(survey(40)) == []


ON_NODE2: list[tuple[dict[str, Any], str, str, str]] = [
    ({"versions": VERSIONS | {"python": "3.12.1"}}, PROBLEM, "python", "python is 3.12.1, and 3.11.7 on the others"),
    ({"versions": VERSIONS | {"torch": "2.11.0"}}, PROBLEM, "torch", "torch is 2.11.0"),
    ({"versions": VERSIONS | {"deepspeed": None}}, PROBLEM, "deepspeed", "deepspeed is not installed"),
    ({"versions": VERSIONS | {"nccl": "2.20.5"}}, PROBLEM, "nccl", "nccl is 2.20.5"),
    ({"versions": VERSIONS | {"code": "ffffffffffff"}}, PROBLEM, "code", "code is ffffffffffff"),
    ({"versions": VERSIONS | {"driver": "550.1"}}, PROBLEM, "driver", "driver is 550.1"),
    ({"devices": facts().devices[:1]}, PROBLEM, "devices", "2 slots, but 1 devices"),
    ({"devices": (Accelerator("A100", 81559, 81000),) * 2}, PROBLEM, "devices", "2 x A100 80 GiB, and 2 x H100"),
    (
        {"devices": (Accelerator("H100", 81559, 81000), Accelerator("H100", 81559, 9))},
        NOTE,
        "device memory",
        "device 1",
    ),
    ({"memory_mib": (1000, 50)}, NOTE, "memory", "less than a tenth"),
    ({"shm_mib": (64, 64)}, PROBLEM, "/dev/shm", "smaller than 1024 MiB"),
    ({"shm_mib": (65536, 3)}, PROBLEM, "/dev/shm", "less than 64 MiB of /dev/shm are free"),
    ({"open_files": (256, 4096)}, PROBLEM, "open files", "fewer than 560 files"),
    ({"addresses": {"node1": None, "node2": "10.0.0.2"}}, PROBLEM, "names", "cannot resolve the name node1"),
    ({"addresses": {"node1": "127.0.1.1", "node2": "10.0.0.2"}}, PROBLEM, "names", "takes node1 for itself"),
    ({"own_address": "127.0.1.1"}, PROBLEM, "interface", "resolves to 127.0.1.1"),
    ({"own_address": None}, PROBLEM, "interface", "resolves to nothing"),
    ({"folder": False}, PROBLEM, "answers", "does not exist there"),
    ({"storage": dataclasses.replace(STORAGE, problem="Read-only file system")}, PROBLEM, "disk", "Read-only"),
    ({"storage": dataclasses.replace(STORAGE, space_mib=(10_000_000, 900))}, NOTE, "disk", "less than 10 GiB"),
    ({"storage": dataclasses.replace(STORAGE, shared=False)}, PROBLEM, "shared", "is not shared with this machine"),
    ({"storage": dataclasses.replace(STORAGE, write_mb_s=20.0)}, NOTE, "write speed", "writes 20 MB/s"),
]


@pytest.mark.parametrize(("change", "level", "row", "what"), ON_NODE2, ids=[what for *_, what in ON_NODE2])
def test_a_fault_of_one_host_is_found_there(change: dict[str, Any], level: str, row: str, what: str) -> None:
    # Of three hosts, so that it is clear which one differs.
    found = [finding for finding in findings(survey(3, {"node2": facts(2, 3, **change)})) if what in finding.what]
    assert [(finding.level, finding.row, finding.hosts) for finding in found] == [(level, row, ("node2",))]
    assert found[0].remedy and "\n" not in str(found[0])


def test_problems_come_before_notes() -> None:
    changed = {"node1": facts(1, memory_mib=(1000, 50)), "node2": facts(2, shm_mib=(64, 64))}
    assert [finding.level for finding in findings(survey(2, changed))] == [PROBLEM, NOTE]


def test_two_hosts_that_differ_are_told_with_both_values() -> None:
    (found,) = findings(survey(2, {"node2": facts(2, versions=VERSIONS | {"python": "3.12.1"})}))
    assert (found.hosts, found.what) == (("node2",), "python is 3.12.1, and 3.11.7 on the others")


def test_a_silent_host_is_a_problem_with_the_reason_and_the_remedy() -> None:
    results = survey(silent={"node2": "does not answer ssh (timed out); try `ssh node2 true`"}, links=None)
    known = {"node1": results.facts["node1"]}
    found = findings(results.model_copy(update={"facts": known, "links_problem": "node2 did not answer"}))
    assert [str(finding) for finding in found] == [
        "problem: node2: does not answer ssh (timed out); try `ssh node2 true`",
        "problem: links were not measured: node2 did not answer; fix the other problems first, then run the doctor "
        "again",
    ]


@pytest.mark.parametrize(
    ("offset_s", "error_s", "expected"),
    [
        (0.9, 0.0, []),
        (3.0, 0.01, ["its clock is 3.0 s ahead"]),
        (-3.0, 0.01, ["its clock is 3.0 s behind"]),
        (3.0, 2.5, []),  # the network was too slow to say
    ],
)
def test_a_clock_counts_as_wrong_only_beyond_what_the_answer_leaves_open(
    offset_s: float, error_s: float, expected: list[str]
) -> None:
    changed = facts(2, clock_offset_s=offset_s, clock_error_s=error_s)
    assert [finding.what for finding in findings(survey(2, {"node2": changed}))] == expected


def test_clones_with_one_name_are_noted() -> None:
    (found,) = findings(survey(2, {"node2": facts(2, hostname="node1")}))
    assert (found.level, found.hosts) == (NOTE, ("node1", "node2"))


# --- interfaces -------------------------------------------------------------------------------------------------------


def loopback(**changes: Any) -> dict[str, HostFacts]:
    return {f"node{number}": facts(number, own_address="127.0.1.1", **changes) for number in (1, 2)}


def test_a_name_that_means_loopback_is_mended_by_naming_the_interface() -> None:
    found = findings(survey(2, loopback()))
    assert [finding.hosts for finding in found] == [("node1",), ("node2",)]
    assert all("GLOO_SOCKET_IFNAME=eth0" in finding.remedy for finding in found)
    (named,) = findings(survey(2, loopback(), interface="eth0"))
    assert (named.level, named.hosts) == (NOTE, ("node1", "node2"))


def test_interfaces_with_different_names_cannot_be_named_for_all() -> None:
    changed = loopback()
    changed["node2"] = facts(2, own_address="127.0.1.1", route="ens1", interfaces={"lo": [], "ens1": ["10.0.0.2"]})
    found = findings(survey(2, changed))
    assert len(found) == 2 and all("correct /etc/hosts" in finding.remedy for finding in found)


def test_an_interface_that_a_host_does_not_have_is_a_problem() -> None:
    (found,) = findings(survey(2, {"node2": facts(2, interfaces={"lo": [], "ib0": []})}, interface="eth0"))
    assert (found.level, found.hosts) == (PROBLEM, ("node2",))


def test_another_interface_than_the_way_to_the_others_is_noted() -> None:
    (found,) = findings(survey(2, {"node2": facts(2, route="ib0")}))
    assert (found.level, found.hosts) == (NOTE, ("node2",)) and "ib0" in found.what


def test_a_single_machine_may_call_itself_what_it_likes() -> None:
    alone = {"node1": facts(1, 1, own_address="127.0.0.1")}
    assert findings(survey(1, alone)) == []


# --- links ------------------------------------------------------------------------------------------------------------


def test_one_slow_boundary_among_others_is_a_problem_that_names_its_ranks() -> None:
    for slow in (boundary(2, 6, 3e-5, 2e9), boundary(2, 6, 4e-4)):
        pairs = (boundary(0, 4), boundary(1, 5), slow, boundary(3, 7))
        (found,) = findings(survey(links=links(boundaries=pairs)))
        assert found.level == PROBLEM and "rank 2 (node1), rank 6 (node2)" in found.what


def test_boundaries_that_are_all_slow_are_noted() -> None:
    slow = tuple(boundary(rank, rank + 4, 5e-3, 50e6) for rank in range(4))
    (found,) = findings(survey(links=links(boundaries=slow)))
    assert found.level == NOTE and "4 stage boundaries are slower than gigabit Ethernet" in found.what


def test_a_wrong_sum_and_a_slow_group_are_problems() -> None:
    groups = [Link("data", (first, first + 1), 5e-5, 6e9, True) for first in (0, 2, 4, 6)]
    groups[1] = dataclasses.replace(groups[1], correct=False)
    groups[3] = dataclasses.replace(groups[3], bytes_s=1e9)
    found = findings(survey(links=links(groups=tuple(groups))))
    assert [finding.level for finding in found] == [PROBLEM, PROBLEM]
    assert "rank 6" in found[0].what and "slower" in found[0].what
    assert "rank 2" in found[1].what and "wrong sum" in found[1].what


def test_ranks_on_cpus_where_there_are_devices_are_a_problem() -> None:
    (found,) = findings(survey(links=links(devices=("cpu",) * 8)))
    assert (found.level, found.row) == (PROBLEM, "devices")


def test_a_finding_is_one_line() -> None:
    many = tuple(f"node{number}" for number in range(9))
    text = str(Finding(NOTE, "clock", many, "what", "remedy"))
    assert text == "note: node0, node1, node2, node3, node4, node5 ...: what; remedy"
