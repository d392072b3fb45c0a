"""The script for Slurm, run with stand-ins for srun and scontrol that start real ranks on the hosts of the lab."""

import sys
from pathlib import Path

import pytest

from tests.lab.hosts import Lab
from tests.lab.launching import VARIABLES, finish, run_config
from tests.lab.slurm import allocation
from tests.lab.test_launchers import LocalLosses, watch_ranks
from tests.launch.runs import ROOT, losses, write_config

pytestmark = pytest.mark.lab


def slurm_folder(folder: Path) -> None:
    """A folder to submit from."""
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "node1").touch()  # what an unquoted node[1-2] would become


def test_the_batch_script_trains_over_two_hosts(
    clean_lab: Lab, lab_corpus: Path, local_losses: LocalLosses, tmp_path: Path
) -> None:
    slurm_folder(tmp_path)
    config = write_config(tmp_path, run_config(lab_corpus, "pipe2") | {"name": "other"})
    batch = allocation(tmp_path, "/usr/bin:/bin") | {"STAGDIST_VENV": sys.prefix}
    call = clean_lab.popen(
        "node1",
        ["bash", "launch/slurm/pretrain.sbatch", str(config), "--set", "name=run"],
        env={**VARIABLES, **batch}, cwd=tmp_path,
    )  # fmt: skip
    assert watch_ranks(clean_lab, 2) == {0: ("node1", VARIABLES), 1: ("node2", VARIABLES)}
    assert clean_lab.ranks()[1].environment["MASTER_PORT"] == "20071"
    finish([call])
    assert losses(tmp_path, "run") == local_losses("pipe2")


def test_the_batch_script_asks_for_a_configuration(lab: Lab) -> None:
    code, text = lab.run("node1", ["bash", "launch/slurm/pretrain.sbatch"], cwd=ROOT)
    assert (code, text) == (2, "usage: sbatch launch/slurm/pretrain.sbatch CONFIG [--set KEY=VALUE ...]\n")
