"""The command of the Kubernetes manifest, run on two hosts that bear the names which pods would have."""

import os
import re
from pathlib import Path

import pytest
import yaml

from tests.lab.hosts import Lab
from tests.lab.launching import BIN, VARIABLES, finish, run_config
from tests.lab.test_launchers import LocalLosses
from tests.launch.runs import ROOT, losses, write_config


@pytest.mark.lab
@pytest.mark.skipif(os.environ.get("LAB") != "all", reason="LAB=all runs every launcher on every grid")
def test_the_command_of_the_manifest_trains_over_two_hosts(
    clean_lab: Lab, lab_corpus: Path, local_losses: LocalLosses, tmp_path: Path
) -> None:
    _, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "pretrain.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    config = write_config(tmp_path, run_config(lab_corpus, "pipe2"))
    for host in clean_lab.hosts:
        with (clean_lab.folder / f"{host}.hosts").open("a") as names:
            names.write("".join(f"{clean_lab.address(f'node{k + 1}')} stagdist-{k}.stagdist\n" for k in range(2)))
    calls = []
    for index, host in enumerate(clean_lab.hosts):
        values = {"NODES": "2", "SLOTS": "1", "INDEX": str(index), "CONFIG": str(config)}
        words = filled_in(container["command"], values)
        calls.append(clean_lab.popen(host, words, env={**VARIABLES, "PATH": f"{BIN}:/usr/bin:/bin"}, cwd=tmp_path))
    finish(calls)
    assert losses(tmp_path, "run") == local_losses("pipe2")


def filled_in(words: list[str], values: dict[str, str]) -> list[str]:
    """As Kubernetes replaces `$(NAME)` in a command."""
    return [re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], word) for word in words]
