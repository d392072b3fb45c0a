"""Every launcher's environment is read as one world."""

import os

import pytest

from stagdist.cluster.environment import World, join_launcher
from stagdist.errors import ConfigError


def test_without_a_launcher_the_process_is_a_world_of_one() -> None:
    environment: dict[str, str] = {}
    assert join_launcher(environment) == World(0, 1, 0, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) > 0


@pytest.mark.parametrize("local_size_key", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_deepspeed_and_torchrun_name_the_place(local_size_key: str) -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local_size_key: "4"}
    assert join_launcher(environment) == World(5, 8, 1, 4)


def test_open_mpi_is_translated_and_needs_a_master() -> None:
    environment = {f"OMPI_COMM_WORLD_{key}": value for key, value in
                   {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        join_launcher(dict(environment))
    assert join_launcher(environment | {"MASTER_ADDR": "node1"}) == World(3, 4, 1, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
)
def test_contradicting_variables_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="RANK"):
        join_launcher(environment)


def test_processes_of_a_host_share_its_cores_unless_told_otherwise() -> None:
    cores = len(os.sched_getaffinity(0))
    alone: dict[str, str] = {}
    World(0, 1, 0, 1).share_cores(alone)
    assert alone["OMP_NUM_THREADS"] == str(cores)
    crowded: dict[str, str] = {}
    World(0, 64, 0, 64).share_cores(crowded)
    assert crowded["OMP_NUM_THREADS"] == "1"
    told = {"OMP_NUM_THREADS": "7"}
    World(0, 2, 0, 2).share_cores(told)
    assert told["OMP_NUM_THREADS"] == "7"
