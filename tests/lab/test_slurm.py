"""The script for Slurm, run with stand-ins for srun and scontrol that start real ranks on the hosts of the lab."""

import sys
from pathlib import Path

import pytest

from tests.lab.hosts import Lab
from tests.lab.launching import VARIABLES, finish, run_config
from tests.lab.test_launchers import LocalLosses, watch_ranks
from tests.launch.runs import ROOT, losses, write_config

pytestmark = pytest.mark.lab

# As srun does: one task per host, the whole environment handed on, one failed task ends all.
SRUN = """\
import os, shlex, subprocess, sys, time
words = sys.argv[1:]
options = [word for word in words[: next(i for i, word in enumerate(words) if not word.startswith("-"))]]
assert options == ["--kill-on-bad-exit=1", "--cpus-per-task=1"], options
words = words[len(options):]
tasks = []
for rank, host in enumerate(("node1", "node2")):
    step = {"STEP_ID": 0, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 2, "STEP_NODELIST": "node[1-2]",
            "STEP_TASKS_PER_NODE": "1(x2)", "NTASKS": 2, "PROCID": rank, "LOCALID": 0, "NODEID": rank}
    variables = {**os.environ, **{"SLURM_" + name: str(value) for name, value in step.items()}}
    settings = [f"{name}={value}" for name, value in variables.items()]
    place = shlex.quote(os.getcwd())
    tasks.append(subprocess.Popen(["ssh", host, f"cd {place} && exec env -i " + shlex.join([*settings, *words])]))
while any(task.poll() is None for task in tasks) and not any(task.poll() for task in tasks):
    time.sleep(0.05)
for task in tasks:
    task.terminate() if any(other.poll() for other in tasks) else task.wait()
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """\
#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] || { echo "scontrol: Invalid job list: $*" >&2; exit 1; }
echo node1
echo node2
"""


def slurm_folder(folder: Path) -> None:
    """A folder to submit from, with srun and scontrol in its bin."""
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "node1").touch()  # what an unquoted node[1-2] would become
    for name, text in (("srun", f"#!{sys.executable}\n{SRUN}"), ("scontrol", SCONTROL)):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o700)


def test_the_batch_script_trains_over_two_hosts(
    clean_lab: Lab, lab_corpus: Path, local_losses: LocalLosses, tmp_path: Path
) -> None:
    slurm_folder(tmp_path)
    config = write_config(tmp_path, run_config(lab_corpus, "pipe2") | {"name": "other"})
    batch = {
        "SLURM_JOB_ID": "10071", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_CPUS_PER_TASK": "1",
        "STAGDIST_VENV": sys.prefix, "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
    }  # fmt: skip
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
