"""Hosts that are cores with their share of the bus: what they bound and refuse, and a rehearsal of the rounds."""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import bounded_host
from benchmarks.hosts.bounded_host import BoundedHost
from benchmarks.hosts.separate_memories import add_arguments, run, table
from stagdist.errors import ConfigError, StagdistError
from tests.benchmarks.tiny import write_tiny
from tests.ranks import run_ranks

MODEL = """\
max_position_embeddings: 128
section_layers: [2, 2]
"""
RUN = """\
training: {steps: 1, global_batch_size: 4, micro_batch_size: 1}
data: {corpora: [{prefix: x}]}
"""


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(given))


def test_a_neighbor_reads_on_the_same_core_only_while_it_has_nothing_else_to_do() -> None:
    cores = os.sched_getaffinity(0)
    with BoundedHost(0, 1) as host:
        assert os.sched_getaffinity(0) == {host.core}
        neighbor = host._neighbor.pid
        end = time.monotonic() + 10
        while os.sched_getscheduler(neighbor) != os.SCHED_IDLE:  # it sets this after it has said that it reads
            assert time.monotonic() < end
            time.sleep(0.01)
        assert os.sched_getaffinity(neighbor) == {host.core}
        before_s = host.neighbor_s()
        began_s = time.process_time()
        while time.process_time() - began_s < 0.3:
            pass
        assert host.neighbor_s() - before_s < 0.1, "this process was first"
        while host.neighbor_s() - before_s < 0.2:
            assert time.monotonic() < end + 10
            time.sleep(0.05)
    assert os.sched_getaffinity(0) == cores and host._neighbor.returncode == 0


def test_a_neighbor_that_ends_too_early_is_an_error() -> None:
    cores = os.sched_getaffinity(0)
    with pytest.raises(StagdistError, match="ended too early, with code -9"), BoundedHost(0, 1) as host:
        os.kill(host._neighbor.pid, signal.SIGKILL)
        os.waitid(os.P_PID, host._neighbor.pid, os.WEXITED | os.WNOWAIT)
    assert os.sched_getaffinity(0) == cores


def test_more_processes_than_cores_and_other_splits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.sched_getaffinity(0)
    with pytest.raises(ConfigError, match="a core each"):
        BoundedHost(0, 10**6)
    monkeypatch.setattr(bounded_host.sys, "executable", "/bin/false")
    with pytest.raises(StagdistError, match="no process could be started"), BoundedHost(0, 1):
        pass
    assert os.sched_getaffinity(0) == cores, "all are free again"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="a process for each section"):
        run(arguments("--no-llama-cpp", "--split", "2+2"))


def run_it(payload: dict[str, Any]) -> int:
    """On every rank: the benchmark itself."""
    return run(arguments(*payload["arguments"]))


@pytest.mark.slow
@pytest.mark.ranks
def test_a_rehearsal_measures_every_contestant_beside_its_bound(tmp_path: Path) -> None:
    path, shape = tmp_path / "memories.json", write_tiny(tmp_path / "tiny.yaml", model=MODEL, rest=RUN)
    quick = ("--rounds", "2", "--steps", "8", "--context", "24", "--split", "2+2", "--no-llama-cpp")
    given = {"arguments": ["--config", str(shape), *quick, "--json", str(path)]}
    run_ranks("tests.benchmarks.test_separate_memories:run_it", 2, given)
    results = json.loads(path.read_text())
    rows = {row["name"]: row for row in results["contestants"]}
    staggered, pipeline, tensor, one = rows.values()
    assert results["hosts_are_cores"] and results["same_tokens"]
    assert set(results["speedup_of_staggered"]) == set(rows) - {staggered["name"]}
    assert [len(row["read_per_step"]) for row in rows.values()] == [2, 2, 2, 1]
    assert sum(sum(part.values()) for part in pipeline["read_per_step"]) == sum(one["read_per_step"][0].values())
    for each, together in ((staggered, max), (tensor, max), (pipeline, sum), (one, sum)):
        pairs = zip(each["read_per_step"], each["bandwidth_bytes_per_s"], strict=True)
        assert each["bound_ms"] == pytest.approx(1e3 * together(sum(read.values()) / rate for read, rate in pairs))
    assert all(name in table(results) for name in rows)
    assert str(tmp_path) not in json.dumps(results)
