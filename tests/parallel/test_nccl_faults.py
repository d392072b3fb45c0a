"""Ranks that are killed, frozen or silent in a step, where `wait` does not raise: the errors are those of gloo."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.nccl_double import Fault
from tests.ranks import free_port, run_ranks

RANKS = 3
TIMEOUT_S = 3.0
NOTICED_S = 3.0
"""How soon a killed rank is noticed at the latest, before any time limit."""

HOW = [("killed", 1), ("killed", 2), ("frozen", 2), ("silent", 1)]
CASES = [(training, how, rank) for training in (False, True) for how, rank in HOW]
DECODING = re.compile(
    r"stage 0 \(rank 0\) lost stage (\d) \(rank \1\) in step \d while .*: "
    r"(Connection|Read error|Write error|Timed out).*; "
    r"a process died, or was silent for 3 s \(--timeout\); see the output of that rank"
)
TRAINING = re.compile(
    r"stage 0, rank 0, step 3: "
    r"((activations|gradients) from stage \d to stage \d|hand-offs and sums of this step): the transfer failed; "
    r"look for the first error of rank [12], or raise parallel.timeout_s if that rank is merely slow. "
    r"Start the same command again: the run resumes from its newest checkpoint"
)
Heard = dict[Fault, list[dict[str, Any]]]

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    """What every rank heard of every fault, on both backends."""
    faults = [Fault("none", 0, nccl, training, free_port()) for training in (False, True) for nccl in (False, True)]
    faults += [
        Fault(how, rank, nccl, training, free_port(), TIMEOUT_S)
        for training, how, rank in CASES
        for nccl in ((False, True) if how == "killed" else (True,))
    ]
    folder: Path = tmp_path_factory.mktemp("faults")
    ranks = run_ranks("tests.parallel.nccl_double:play", RANKS, (faults, folder), timeout_s=400)
    return {fault: [rank[number] for rank in ranks] for number, fault in enumerate(faults)}


def of(heard: Heard, how: str, rank: int, *, nccl: bool, training: bool) -> list[dict[str, Any]]:
    """What the ranks heard of one fault."""
    wanted = (how, rank, nccl, training)
    return next(said for each, said in heard.items() if (each.how, each.rank, each.nccl, each.training) == wanted)


@pytest.mark.parametrize("training", [False, True], ids=["decoding", "training"])
def test_without_a_fault_both_backends_do_the_same(heard: Heard, training: bool) -> None:
    gloo, nccl = (of(heard, "none", 0, nccl=which, training=training) for which in (False, True))
    assert [rank["says"] for rank in gloo] == [rank["says"] for rank in nccl]
    assert gloo[0]["says"].startswith("[")


@pytest.mark.parametrize(("training", "how", "rank"), CASES)
def test_a_lost_peer_is_named_where_wait_does_not_raise(heard: Heard, training: bool, how: str, rank: int) -> None:
    first = of(heard, how, rank, nccl=True, training=training)[0]
    form = TRAINING if training else DECODING
    assert form.fullmatch(first["says"]), first["says"]
    if how == "killed":
        gloo = of(heard, how, rank, nccl=False, training=training)[0]
        assert form.fullmatch(gloo["says"]), gloo["says"]
        assert first["seconds"] < NOTICED_S, "not by the time limit"
    elif not training:
        assert "Timed out waiting 3 s for the device" in first["says"]
        assert first["seconds"] >= TIMEOUT_S


@pytest.mark.parametrize(("how", "rank"), HOW)
def test_the_peer_that_is_blamed_while_decoding_is_the_lost_one(heard: Heard, how: str, rank: int) -> None:
    said = of(heard, how, rank, nccl=True, training=False)[0]["says"]
    if how == "killed":
        assert f"lost stage {rank} (rank {rank})" in said
    else:  # of a device that stands still only the missing token is known
        assert re.search(r"lost stage 2 \(rank 2\) in step [34] while it waited for the token", said)
