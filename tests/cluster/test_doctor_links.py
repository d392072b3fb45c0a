"""Links: command lines of the launchers, what comes back through them, and a real measurement on two ranks."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from stagdist.cluster.doctor import link_probe
from stagdist.cluster.doctor.facts import Links
from stagdist.cluster.doctor.run_probes import LinkPlan, deepspeed_words, measure_links, read_output
from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.remote import Finished
from stagdist.errors import TransportError
from stagdist.parallel.grid import Grid
from tests.cluster.doctor_cases import links
from tests.ranks import free_port, run_ranks

HOSTS = (Host("node1", 2), Host("node2", 2))
PLAN = LinkPlan(Grid(2, 2, 1), HOSTS, "pdsh", "node1", 23456, {})
DONE = [Finished(0, "", "", 1.0)]


def test_the_launcher_is_told_hosts_port_and_module() -> None:
    words = deepspeed_words(PLAN, Path("/tmp/hostfile"))
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    for pair in (["--hostfile", "/tmp/hostfile"], ["--launcher", "pdsh"], ["--master_addr", "node1"]):
        assert words[words.index(pair[0]) + 1] == pair[1]
    assert "--force_multi" in words and words[words.index("--grid") + 1 :][:3] == ["2", "2", "1"]
    alone = deepspeed_words(dataclasses.replace(PLAN, hosts=()), Path("/nowhere"))
    assert "--launcher" not in alone and alone[alone.index("--num_accelerators") + 1] == "4"


def test_a_large_result_comes_through_launchers_that_prefix_mix_and_reorder_lines() -> None:
    measured = links(200)
    lines = link_probe.pieces(measured)
    assert len(lines) > 10 and max(map(len, lines)) < 1100
    text = "\n".join(f"node1: {line}\nnode2: noise" for line in reversed(lines))
    assert read_output(text, DONE) == measured


@pytest.mark.parametrize(
    ("text", "outputs", "complaint"),
    [
        (link_probe.pieces(links(200))[0], DONE, "the launcher failed: no answer"),
        ("", [Finished(None, "", "", 180.0)], "did not end within the time limit"),
        ("[launch.py] Process 7 exits with return code = -14\n", DONE, "did not end within the time limit"),
        ("prterun noticed that process rank 1 exited on signal 14 (Alarm clock).\n", DONE, "within the time limit"),
        ("", [Finished(127, "", "bash: pdsh: not found\n", 1.0)], "pdsh: not found"),
        (
            "n2: STAGDIST-LINKS-ERROR rank 3 on n2: RuntimeError: Connection closed by peer END\n"
            "n1: STAGDIST-LINKS-ERROR rank 1 on n1: ConfigError: no device END\n",
            DONE,
            "2 ranks failed, the first: rank 1 on n1: ConfigError: no device",
        ),
    ],
)
def test_a_failure_is_told_by_its_cause(text: str, outputs: list[Finished], complaint: str) -> None:
    with pytest.raises(TransportError, match=complaint):
        read_output(text, outputs)


def test_links_survive_json() -> None:
    assert TypeAdapter(Links).validate_json(json.dumps(dataclasses.asdict(links()))) == links()


@pytest.mark.ranks
def test_ranks_that_fail_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGDIST_PRIVATE_ENV", "/nowhere")
    plan = LinkPlan(Grid(2, 1, 1), (), "pdsh", "127.0.0.1", free_port(), {})
    with pytest.raises(TransportError, match="the first: rank [01] on .*: ConfigError: .*/nowhere cannot be read"):
        measure_links(plan)


def measure_four(payload: tuple[int, int, int]) -> Links | None:
    from stagdist.parallel.world import join_launcher

    return link_probe.measure(Grid(*payload), join_launcher(), 1 << 20, 60.0)


@pytest.mark.ranks
def test_every_boundary_and_every_group_is_measured_once() -> None:
    first, *others = run_ranks("tests.cluster.test_doctor_links:measure_four", 4, (2, 2, 1))
    assert others == [None, None, None]
    assert sorted(one.ranks for one in first.boundaries) == [(0, 2), (1, 3)]
    assert sorted((one.axis, one.ranks) for one in first.reductions) == [
        ("all", (0, 1, 2, 3)), ("data", (0, 1)), ("data", (2, 3)),
    ]  # fmt: skip
    assert all(one.correct for one in first.reductions)
    chain = run_ranks("tests.cluster.test_doctor_links:measure_four", 4, (4, 1, 1))[0]
    assert sorted((one.stage, one.ranks) for one in chain.boundaries) == [(0, (0, 1)), (1, (1, 2)), (2, (2, 3))]
