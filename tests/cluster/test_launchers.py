"""Command lines of the supervisor's launchers hold nothing that a shell on the hosts could run."""

import shlex
import sys
from pathlib import Path

import pytest

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.shell_variables import rank_variables
from stagdist.cluster.hosts.start import (
    Launch,
    Launcher,
    check_paths,
    commands,
    environment_file,
    for_deepspeed,
    launcher_environment,
)
from stagdist.errors import ConfigError

LAUNCH = Launch(
    hosts=(Host("a", 2), Host("b", 1)),
    master_address="10.0.0.1",
    master_port=20001,
    job=Path("/run/job.json"),
    hostfile=Path("/run/hostfile"),
    environment_file=Path("/run/env"),
    mark="m.1",
    folder=Path("/work"),
)
DEEPSPEED: list[Launcher] = ["pdsh", "openmpi"]
WITH_PASSWORD = "https://u:PaSsW0rd@mlflow:5000"


@pytest.mark.parametrize("launcher", DEEPSPEED)
def test_deepspeed_starts_one_agent_per_slot_also_on_a_single_host(launcher: Launcher) -> None:
    (words,) = commands(launcher, LAUNCH)
    assert {"--force_multi", "/run/hostfile", launcher, "10.0.0.1", "20001"} <= set(words)
    assert words[-4:] == ["--module", "stagdist.cluster.supervision.agent", "--job", "/run/job.json"]


def test_torchrun_is_started_on_every_host_with_its_own_number_of_ranks() -> None:
    lines = [words[-1] for words in commands("torchrun", LAUNCH)]
    for node, (line, slots) in enumerate(zip(lines, (2, 1), strict=True)):
        words = shlex.split(line)
        assert words[words.index("--nproc-per-node") + 1] == str(slots)
        assert words[words.index("--node-rank") + 1] == str(node)
        assert "STAGDIST_JOB=m.1" in words


@pytest.mark.parametrize("launcher", DEEPSPEED)
@pytest.mark.parametrize("name", ["NCCL_DEBUG", "UCX_X", "MLFLOW_X", "MV2_X"])
def test_variables_that_deepspeed_would_hand_on_unquoted_are_kept_from_it(launcher: Launcher, name: str) -> None:
    environment = launcher_environment(launcher, LAUNCH, {name: "$(touch hit)", "HOME": "a b", "NCCL_IB": "1"})
    assert name not in environment
    assert environment["HOME"] == "a b" and environment["NCCL_IB"] == "1"
    assert environment["STAGDIST_JOB"] == "m.1" and environment["DS_ENV_FILE"] == "/run/env"


def test_the_file_for_deepspeed_holds_what_python_needs_and_nothing_secret() -> None:
    shell = {"PATH": "/bin", "PYTHONPATH": "/x", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "NCCL_DEBUG": "INFO"}
    lines = environment_file(LAUNCH, shell).splitlines()
    assert sorted(lines) == [
        "MASTER_ADDR=10.0.0.1", "MASTER_PORT=20001", "PATH=/bin", "PYTHONPATH=/x", "STAGDIST_JOB=m.1",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        environment_file(LAUNCH, {"PYTHONPATH": "`id`"})


@pytest.mark.parametrize("path", ["/runs/a b", "/runs/$(id)", "/runs/a;b", "/runs/a'b"])
def test_paths_that_a_shell_would_split_or_run_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="shell"):
        check_paths("/fine", path)


@pytest.mark.parametrize("launcher", DEEPSPEED)
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "NCCL_SECRET", "PYTHON_KEYRING_PASSWORD"])
def test_a_secret_that_deepspeed_would_export_by_itself_is_kept_from_its_command_line(
    launcher: Launcher, name: str
) -> None:
    environment = {name: "plain-but-secret", "PATH": "/usr/bin"}
    assert name not in launcher_environment(launcher, LAUNCH, environment)
    assert "plain-but-secret" not in environment_file(LAUNCH, environment)


@pytest.mark.parametrize("launcher", DEEPSPEED)
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "NCCL_X", "UCX_X", "MV2_X", "PYTHON_X"])
def test_a_url_with_a_password_is_kept_from_deepspeeds_command_line(launcher: Launcher, name: str) -> None:
    environment = {name: WITH_PASSWORD, "DS_ACCELERATOR": WITH_PASSWORD, "PATH": "/usr/bin"}
    assert name not in launcher_environment(launcher, LAUNCH, environment)
    assert "PaSsW0rd" not in environment_file(LAUNCH, environment)
    assert rank_variables(environment)[name] == WITH_PASSWORD, "the job's private file brings it"


@pytest.mark.parametrize("launcher", DEEPSPEED)
def test_a_url_without_a_password_is_left_to_deepspeed(launcher: Launcher) -> None:
    environment = {"MLFLOW_TRACKING_URI": "https://mlflow:5000/a@b"}
    assert launcher_environment(launcher, LAUNCH, environment)["MLFLOW_TRACKING_URI"] == "https://mlflow:5000/a@b"


@pytest.mark.parametrize("name", ["NCCL_X", "TORCH_NCCL_X", "NCCL_SECRET"])
def test_deepspeeds_local_launcher_gets_nothing_secret_that_it_would_log(name: str) -> None:
    environment = {name: WITH_PASSWORD, "NCCL_DEBUG": "INFO", "HF_ENDPOINT": WITH_PASSWORD}
    kept = launcher_environment("local", LAUNCH, environment)
    assert name not in kept and kept["NCCL_DEBUG"] == "INFO" and kept["HF_ENDPOINT"] == WITH_PASSWORD


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "torchrun", "local"])
def test_no_value_of_the_shell_stands_in_the_launchers_words(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", WITH_PASSWORD)
    assert "PaSsW0rd" not in str(commands(launcher, LAUNCH))


@pytest.mark.parametrize("name", ["PYTHONPATH", "PATH"])
def test_a_password_on_a_path_is_refused_without_being_shown(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} holds a URL with a password") as caught:
        environment_file(LAUNCH, {name: f"/x:{WITH_PASSWORD}"})
    assert "PaSsW0rd" not in str(caught.value)


def test_python_variables_that_are_not_plain_are_refused_and_mpirun_beside_python_is_found() -> None:
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        for_deepspeed({"PYTHONPATH": "/a;touch x"})
    assert for_deepspeed({"PATH": "/bin"})["PATH"] == f"{Path(sys.executable).parent}:/bin"
