"""The scripts for Slurm, run with stand-ins for srun and scontrol that start real ranks on the hosts of the lab."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from tests.lab.hosts import Lab
from tests.lab.inside import HostProcess
from tests.lab.launching import VARIABLES, finish, run_config
from tests.lab.slurm import allocation
from tests.lab.test_launchers import LocalLosses, watch_ranks
from tests.lab.test_served_hosts import health, wait_for
from tests.launch.generating import write_model
from tests.launch.runs import ROOT, losses, write_config

pytestmark = pytest.mark.lab


def slurm_folder(folder: Path) -> None:
    """A folder to submit from."""
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "node1").touch()  # what an unquoted node[1-2] would become


@pytest.mark.slow  # the next test runs the script until its ranks read the configuration
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


def holds_open(process: HostProcess, path: Path) -> bool:
    """Whether a process has opened a file."""
    with contextlib.suppress(FileNotFoundError):  # the process has ended
        for descriptor in Path(f"/proc/{process.identity.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is closed by now, or no file
                if descriptor.samefile(path):
                    return True
    return False


def test_the_batch_script_starts_a_rank_on_every_host(clean_lab: Lab, tmp_path: Path) -> None:
    slurm_folder(tmp_path)
    config = tmp_path / "empty.yaml"
    os.mkfifo(config)
    writing = os.open(config, os.O_RDWR)  # ranks wait for text until it is closed; opening does not block
    batch = allocation(tmp_path, "/usr/bin:/bin") | {"STAGDIST_VENV": sys.prefix}
    words = ["bash", "launch/slurm/pretrain.sbatch", str(config)]
    call = clean_lab.popen("node1", words, env={**VARIABLES, **batch}, cwd=tmp_path)
    assert watch_ranks(clean_lab, 2) == {0: ("node1", VARIABLES), 1: ("node2", VARIABLES)}
    for rank in clean_lab.ranks().values():
        assert rank.environment["MASTER_PORT"] == "20071"
        assert list(rank.command)[-3:] == ["launch/pretrain.py", "--config", str(config)]
    while not all(holds_open(rank, config) for rank in clean_lab.ranks().values()):
        assert call.poll() is None, call.text()
        time.sleep(0.05)
    (tmp_path / "other").touch()
    (tmp_path / "other").replace(config)
    os.close(writing)
    assert call.wait(120) in (2, 255), call.text()  # srun gives the largest code: 255 is that of a task which it ended
    assert f"error: {config} must hold keys" in call.text()


@pytest.mark.slow  # test_supervisor.py starts ranks by srun, and a test below runs the script until they start
def test_the_supervised_batch_script_trains_over_two_hosts(
    clean_lab: Lab, lab_corpus: Path, local_losses: LocalLosses, tmp_path: Path
) -> None:
    slurm_folder(tmp_path)
    config = write_config(tmp_path, run_config(lab_corpus, "pipe2"))
    batch = allocation(tmp_path, "/usr/bin:/bin") | {"STAGDIST_VENV": sys.prefix, "SPARES": "0"}
    words = ["bash", "launch/slurm/supervised.sbatch", str(config)]
    finish([clean_lab.popen("node1", words, env={**VARIABLES, **batch}, cwd=tmp_path)])
    assert losses(tmp_path, "run") == local_losses("pipe2")
    assert (tmp_path / "hostfile.10071").read_text() == "node1 slots=1\nnode2 slots=1\n"
    output = sorted(path.name for path in (tmp_path / "runs/run/logs/attempt_001").iterdir())
    assert output == ["rank_00000.node1.log", "rank_00001.node2.log"]
    assert clean_lab.processes() == []


@pytest.mark.slow  # test_served_hosts.py and the scripts above check the same parts
def test_the_serving_batch_script_serves_over_two_hosts(clean_lab: Lab, tmp_path: Path) -> None:
    slurm_folder(tmp_path)
    model = write_model(tmp_path / "model")
    batch = allocation(tmp_path, "/usr/bin:/bin") | {"STAGDIST_VENV": sys.prefix, "PORT": "8000"}
    words = ["bash", "launch/slurm/serve.sbatch", str(model), "--device", "cpu"]
    call = clean_lab.popen("node1", words, env={**VARIABLES, **batch}, cwd=tmp_path)
    wait_for(clean_lab, call, "node1", "200", 90)
    assert health(clean_lab, "node2") == "nothing"
    assert call.text().startswith("http://node1:8000\n")
    assert (tmp_path / "hostfile.10071").read_text() == "node1 slots=1\nnode2 slots=1\n"
    clean_lab.signal(call, 15)
    assert call.wait(60) == 143, call.text()
    assert (tmp_path / "runs" / "serve-10071" / "run.json").exists()
    assert health(clean_lab, "node1") == "nothing"


def test_the_last_nodes_of_the_allocation_are_spares(clean_lab: Lab, tmp_path: Path) -> None:
    slurm_folder(tmp_path)
    batch = allocation(tmp_path, "/usr/bin:/bin") | {"STAGDIST_VENV": sys.prefix}
    code, text = clean_lab.run(
        "node1", ["bash", "launch/slurm/supervised.sbatch", "none.yaml"], env={**VARIABLES, **batch}, cwd=tmp_path
    )
    assert code == 2 and "none.yaml" in text.splitlines()[-1]
    assert (tmp_path / "hostfile.10071").read_text() == "node1 slots=1\n#spare node2 slots=1\n"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pretrain", "CONFIG [--set KEY=VALUE ...]"),
        ("supervised", "CONFIG [--set KEY=VALUE ...]"),
        ("serve", "MODEL [options of launch/serve.py]"),
    ],
)
def test_the_batch_scripts_ask_for_their_argument(lab: Lab, name: str, arguments: str) -> None:
    code, text = lab.run("node1", ["bash", f"launch/slurm/{name}.sbatch"], cwd=ROOT)
    assert (code, text) == (2, f"usage: sbatch launch/slurm/{name}.sbatch {arguments}\n")
