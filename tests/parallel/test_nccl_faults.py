"""Ranks that are killed, frozen or stuck in a step: where `wait` does not raise, the errors are those of gloo."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.nccl_faults import DECODING, RANKS, TRAINING, Fault
from tests.ranks import free_port, run_ranks

TIMEOUT_S = {"none": 60.0, "killed": 20.0, "frozen": 3.0, "silent": 3.0}
"""A killed rank must be noticed without the time limit."""
NOTICED_S = 8.0
CAPTURED_S = 5.0
"""Limit where a frozen rank is in a captured step: the ranks capture before, some later than others."""

CASES = [
    ("chunk", "killed", 2),
    ("chunk", "silent", 0),
    ("hand-off", "killed", 0),
    ("hand-off", "killed", 1),
    ("hand-off", "frozen", 1),
    ("graph", "killed", 1),
    ("graph", "killed", 2),
    ("graph", "frozen", 1),
    ("capture", "killed", 1),
    ("sum", "killed", 1),
    ("sum", "frozen", 2),
    ("forward", "killed", 0),
    ("forward", "killed", 1),
    ("forward", "frozen", 2),
    ("tied gradients", "killed", 2),
    ("tied gradients", "silent", 0),
    ("update", "killed", 1),
    ("update", "frozen", 2),
]
ON_GLOO = [case for case in CASES if case[1:] == ("killed", 1) and case[0] not in ("graph", "capture")]
DECODING_ERROR = re.compile(
    r"stage (\d) \(rank \1\) lost (its peers|stage (\d) \(rank \3\)) in step \d while .*: "
    r"(Connection|Read error|Write error|Timed out).*; "
    r"a process ended or did not respond for \d+ s \(--timeout\); see the output of that rank"
)
TRAINING_ERROR = re.compile(
    r"stage (\d), rank \1, step 3: "
    r"(((activations|gradients) from stage \d to stage \d|hand-offs and sums of this step): the transfer failed; "
    r"look for the first error of rank \d, or raise parallel.timeout_s if that rank is merely slow"
    r"|another rank ended, or did not answer within parallel.timeout_s = \d+ s)"
    r". Start the same command again: the run resumes from its newest checkpoint"
)
Reports = dict[Fault, list[dict[str, Any]]]

pytestmark = pytest.mark.ranks


def limit_s(where: str, how: str) -> float:
    """Time limit of the waits of a run with a fault."""
    return CAPTURED_S if (where, how) == ("graph", "frozen") else TIMEOUT_S[how]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What every rank reported for every fault, on both backends."""
    faults = [
        Fault("none", 0, where, nccl, free_port(), TIMEOUT_S["none"])
        for where in ("hand-off", "graph", "sum", "forward")
        for nccl in (False, True)
    ]
    # Several are run at once. Sorted, those that wait for their time limit are.
    faults += [
        Fault(how, rank, where, nccl, free_port(), limit_s(where, how))
        for where, how, rank in sorted(CASES, key=lambda case: limit_s(*case[:2]))
        for nccl in ((False, True) if (where, how, rank) in ON_GLOO else (True,))
    ]
    folder: Path = tmp_path_factory.mktemp("faults")
    ranks = run_ranks("tests.parallel.nccl_faults:play", RANKS, (faults, folder))
    return {fault: [rank[number] for rank in ranks] for number, fault in enumerate(faults)}


def of(reports: Reports, where: str, how: str, rank: int, *, nccl: bool) -> list[dict[str, Any]]:
    """What the ranks reported for one fault."""
    wanted = (where, how, rank, nccl)
    return next(said for each, said in reports.items() if (each.where, each.how, each.rank, each.nccl) == wanted)


@pytest.mark.parametrize("where", ["hand-off", "graph", "sum", "forward"])
def test_without_a_fault_both_backends_do_the_same(reports: Reports, where: str) -> None:
    gloo, nccl = (of(reports, where, "none", 0, nccl=which) for which in (False, True))
    assert [rank["says"] for rank in gloo] == [rank["says"] for rank in nccl]
    assert gloo[0]["says"].startswith("[")


@pytest.mark.parametrize(("where", "how", "victim"), CASES)
def test_every_other_rank_names_what_it_lost_where_wait_does_not_raise(
    reports: Reports, where: str, how: str, victim: int
) -> None:
    form = TRAINING_ERROR if where in TRAINING else DECODING_ERROR
    for nccl in (True, False) if (where, how, victim) in ON_GLOO else (True,):
        for rank, said in enumerate(of(reports, where, how, victim, nccl=nccl)):
            if rank == victim:
                assert said["says"] == "nothing"
                continue
            assert form.fullmatch(said["says"]), said["says"]
            if how == "killed":
                assert said["seconds"] < NOTICED_S, "not by the time limit"


@pytest.mark.parametrize(("where", "how", "victim"), [case for case in CASES if case[0] in DECODING and case[2]])
def test_rank_0_names_a_lost_peer_while_decoding(reports: Reports, where: str, how: str, victim: int) -> None:
    first = of(reports, where, how, victim, nccl=True)[0]
    if how == "killed":
        assert f"lost stage {victim} (rank {victim})" in first["says"]
    else:
        # A control message over gloo may run into the same limit a moment earlier.
        limit = limit_s(where, how)
        pattern = rf"Timed out waiting {limit:g}( s for the device|000ms for send)"
        assert re.search(pattern, first["says"]), first["says"]
        assert first["seconds"] >= limit
