"""No process group waits forever for a lost peer."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from stagdist.config.run_config import RunConfig
from stagdist.parallel.groups import WATCHDOG_GRACE_S, set_default_timeout
from stagdist.parallel.world import join_world
from stagdist.training.engine.section_engine import build_engine
from tests.ranks import free_port, run_ranks
from tests.training.parity_cases import Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

pytestmark = pytest.mark.ranks

TIMEOUT_S = 77.0
CASE = Case("timeouts", {}, (2, 2, 1))


def group_timeouts(case: Case) -> dict[str, tuple[int, float]]:
    """Members and limit in seconds of every group of this rank after a training step, by name."""
    groups = World(TIMEOUT_S).groups(case.grid)
    engine = build_engine(_with_timeout(case.config()), groups)
    engine.train_batch(micro_batches(case, groups, *case.batches()[0]))
    return {name: (size, seconds) for name, size, seconds in _known_groups(torch.device(os.environ["DS_ACCELERATOR"]))}


def _with_timeout(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"timeout_s": TIMEOUT_S})})


def _known_groups(device: torch.device) -> Iterator[tuple[str, int, float]]:
    for group in c10d._world.pg_map:
        yield group.group_name, group.size(), group._get_backend(device).options._timeout.total_seconds()


def test_every_process_group_has_the_configured_timeout() -> None:
    for rank, timeouts in enumerate(run_ranks("tests.training.engine.test_timeouts:group_timeouts", 4, CASE)):
        wrong = {name: seconds for name, (_, seconds) in timeouts.items() if seconds != TIMEOUT_S}
        assert wrong == {}, f"rank {rank}"
        # The groups include the world and those of the pipe and data axes.
        assert {size for size, _ in timeouts.values()} >= {4, 2}, f"rank {rank}: {timeouts}"


def test_the_watchdog_of_nccl_waits_longer_than_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, None)
    set_default_timeout(TIMEOUT_S)
    limits = {name: c10d._get_default_timeout(c10d.Backend(name)).total_seconds() for name in ("gloo", "nccl")}
    assert limits == {"gloo": TIMEOUT_S, "nccl": TIMEOUT_S + WATCHDOG_GRACE_S}


@pytest.mark.parametrize(("device", "limit_s"), [("cpu", TIMEOUT_S), ("cuda:0", TIMEOUT_S + WATCHDOG_GRACE_S)])
def test_the_watchdog_of_the_default_group_waits_longer_on_nccl(
    device: str, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.update(options, backend=backend))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    join_world(device, TIMEOUT_S, environment={"RANK": "0", "WORLD_SIZE": "1", **address})
    assert made["timeout"].total_seconds() == limit_s
    assert made["backend"] == ("gloo" if device == "cpu" else "nccl")
