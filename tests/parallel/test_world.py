"""Every launcher's environment is read as one world."""

import os
import socket
from pathlib import Path

import pytest

from stagdist.errors import ConfigError
from stagdist.parallel.world import World, join_launcher, name_interface


def test_without_a_launcher_the_process_is_a_world_of_one() -> None:
    environment: dict[str, str] = {}
    assert join_launcher(environment) == World(0, 1, 0, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) > 0


@pytest.mark.parametrize("local_size_key", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_variables_of_deepspeed_and_torchrun_are_read(local_size_key: str) -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local_size_key: "4"}
    assert join_launcher(environment) == World(5, 8, 1, 4)


def test_open_mpi_is_translated_and_needs_a_master() -> None:
    environment = {f"OMPI_COMM_WORLD_{key}": value for key, value in
                   {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        join_launcher(dict(environment))
    assert join_launcher(environment | {"MASTER_ADDR": "127.0.0.1"}) == World(3, 4, 1, 2)


SRUN = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_NTASKS": "12", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x3)", "MASTER_ADDR": "node1",
    "GLOO_SOCKET_IFNAME": "eth0",
}  # fmt: skip


def test_srun_is_translated() -> None:
    assert join_launcher(dict(SRUN)) == World(9, 12, 1, 4)
    assert join_launcher({key: SRUN[key] for key in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")} | {
        "MASTER_ADDR": "127.0.0.1"}) == World(9, 12, 1, 1)  # fmt: skip


def test_srun_needs_a_master() -> None:
    with pytest.raises(ConfigError, match=r"srun started this process, but MASTER_ADDR is not set.*before srun"):
        join_launcher({key: value for key, value in SRUN.items() if key != "MASTER_ADDR"})


def test_a_launcher_inside_a_slurm_job_takes_precedence() -> None:
    assert join_launcher(SRUN | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(3, 4, 1, 1)


def test_a_program_in_a_batch_script_without_srun_is_a_world_of_one() -> None:
    batch = {key: value for key, value in SRUN.items() if "STEP" not in key and key != "MASTER_ADDR"}
    assert join_launcher(batch | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == World(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("text", "node", "size"), [("8", "0", 8), ("8(x3),4", "2", 8), ("8(x3),4", "3", 4), ("2,3(x2)", "1", 3)]
)
def test_tasks_of_this_host_are_read_from_slurms_list(text: str, node: str, size: int) -> None:
    environment = SRUN | {"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": node}
    assert join_launcher(environment).local_size == size


def test_an_invalid_list_of_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE is '8x3'; expected a list such as 8"):
        join_launcher(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8x3"})


# Two interfaces: eth0 with 10.77.0.0/24, and ib0 with 10.0.0.0/8 and everything else.
ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00004D0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
ib0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
ib0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
"""
NAMES = {"debian": "127.0.1.1", "server": "10.77.0.2", "near": "10.77.0.1", "far": "10.1.2.3", "away": "192.0.2.1"}


def interface(
    monkeypatch: pytest.MonkeyPatch, folder: Path, own_name: str, environment: dict[str, str], routes: str = ROUTES
) -> str | None:
    """The interface that a host of this name would choose."""
    routes_file = folder / "routes"
    routes_file.write_text(routes)
    monkeypatch.setattr(socket, "gethostname", lambda: own_name)

    def look_up(name: str) -> str:
        if name not in NAMES:
            raise socket.gaierror("no such name")
        return NAMES[name]

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    name_interface(environment, routes_file)
    return environment.get("GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(("first", "expected"), [("near", "eth0"), ("far", "ib0"), ("away", "ib0")])
@pytest.mark.parametrize("own_name", ["debian", "unknown"])
def test_a_host_name_that_resolves_to_loopback_selects_the_interface_towards_the_first_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_name: str, first: str, expected: str
) -> None:
    assert interface(monkeypatch, tmp_path, own_name, {"MASTER_ADDR": first}) == expected


def test_the_interface_is_not_set_where_gloo_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert interface(monkeypatch, tmp_path, "server", {"MASTER_ADDR": "near"}) is None
    assert interface(monkeypatch, tmp_path, "debian", {"MASTER_ADDR": "127.0.0.1"}) is None
    assert interface(monkeypatch, tmp_path, "debian", {"MASTER_ADDR": "near", "GLOO_SOCKET_IFNAME": "x"}) == "x"


def test_the_first_host_takes_its_only_interface_or_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = "\n".join(ROUTES.splitlines()[:2])
    assert interface(monkeypatch, tmp_path, "debian", {"MASTER_ADDR": "debian"}, one) == "eth0"
    with pytest.raises(
        ConfigError, match=r"host name debian resolves to a loopback.*eth0, ib0 leads.*GLOO_SOCKET_IFNAME"
    ):
        interface(monkeypatch, tmp_path, "debian", {"MASTER_ADDR": "debian"})


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


def test_processes_of_a_host_share_its_cores_unless_omp_num_threads_is_set() -> None:
    cores = len(os.sched_getaffinity(0))
    alone: dict[str, str] = {}
    World(0, 1, 0, 1).share_cores(alone)
    assert alone["OMP_NUM_THREADS"] == str(cores)
    crowded: dict[str, str] = {}
    World(0, 64, 0, 64).share_cores(crowded)
    assert crowded["OMP_NUM_THREADS"] == "1"
    already_set = {"OMP_NUM_THREADS": "7"}
    World(0, 2, 0, 2).share_cores(already_set)
    assert already_set["OMP_NUM_THREADS"] == "7"
