"""Training and decoding over two hosts, started by every launcher, give what they give on one machine."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.hosts import Lab
from tests.lab.launching import GRIDS, LAUNCHERS, VARIABLES, finish, pretrain, start, whole_matrix
from tests.launch.generating import GENERATE, run_ranks_to_end, write_model
from tests.launch.runs import losses
from tests.ranks import GUARD_S

pytestmark = pytest.mark.lab

# A launch takes 10 to 20 seconds: usually pdsh once, and torchrun for text where host names mean loopback.
USUAL = {("pdsh", "pipe2")}
SLOW = {
    ("no_ssh", "pipe2"): [pytest.mark.slow],  # torchrun is started on every host like this as well
    # pdsh hands the same variables on, and tests/parallel/test_world.py reads those of Open MPI.
    ("openmpi", "pipe2"): [pytest.mark.slow],
}
MATRIX = [
    pytest.param(launcher, grid, marks=[] if (launcher, grid) in USUAL else SLOW.get((launcher, grid), [whole_matrix]))
    for launcher in LAUNCHERS
    for grid in GRIDS
]
LocalLosses = Callable[[str], dict[int, float]]


@pytest.mark.parametrize(("launcher", "grid"), MATRIX)
def test_training_over_two_hosts_gives_the_losses_of_one_machine(
    clean_lab: Lab, lab_corpus: Path, local_losses: LocalLosses, tmp_path: Path, launcher: str, grid: str
) -> None:
    calls = pretrain(clean_lab, launcher, tmp_path, lab_corpus, grid)
    slots = GRIDS[grid].slots
    seen = watch_ranks(clean_lab, 2 * slots)
    finish(calls)
    # Every rank is on its host, and what was set in the shell of the first host has arrived everywhere.
    assert seen == {rank: (f"node{rank // slots + 1}", VARIABLES) for rank in range(2 * slots)}
    assert losses(tmp_path, "run") == local_losses(grid)  # to the last bit
    assert clean_lab.processes() == []


def watch_ranks(lab: Lab, number: int) -> dict[int, tuple[str, dict[str, str]]]:
    """Wait until so many ranks run; host and the variables of ours that each was started with."""
    deadline = time.monotonic() + GUARD_S
    while len(ranks := lab.ranks()) < number:
        assert time.monotonic() < deadline, f"only ranks {sorted(ranks)} of {number} after {GUARD_S:g} s"
        time.sleep(0.2)  # a look reads all of /proc
    return {
        rank: (one.host, {name: value for name, value in one.environment.items() if name in VARIABLES})
        for rank, one in ranks.items()
    }


@pytest.mark.slow  # the next test checks the same with ranks that decode
def test_hosts_whose_own_name_means_loopback_find_each_other(
    clean_lab: Lab, lab_corpus: Path, local_losses: LocalLosses, tmp_path: Path
) -> None:
    clean_lab.name_hosts(loopback=True)
    finish(pretrain(clean_lab, "torchrun", tmp_path, lab_corpus, "pipe2"))
    assert losses(tmp_path, "run") == local_losses("pipe2")


GENERATIONS = [
    pytest.param("pdsh", marks=whole_matrix), pytest.param("openmpi", marks=pytest.mark.slow),
    pytest.param("no_ssh", marks=whole_matrix), "torchrun",
]  # fmt: skip


@pytest.mark.parametrize("launcher", GENERATIONS)
def test_sections_on_two_hosts_write_the_text_of_one_process(clean_lab: Lab, tmp_path: Path, launcher: str) -> None:
    clean_lab.name_hosts(loopback=launcher == "torchrun")
    model = write_model(tmp_path / "model")
    options = ["--prompt", "def main(", "--max-new-tokens", "24", "--seed", "5", "--json"]
    alone = run_ranks_to_end(model, *options)
    assert alone.returncode == 0, alone.stderr.decode()
    text = finish(
        start(clean_lab, launcher, tmp_path, [str(GENERATE), "--model", str(model), "--device", "cpu", *options])
    )
    answers = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"text"' in line]
    assert len(answers) == 1
    assert answers[0]["text"] == json.loads(alone.stdout)["text"]
