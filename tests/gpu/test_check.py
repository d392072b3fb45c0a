"""The command `python -m tests.gpu.check`: its rehearsal, and what it makes of checks that hang, fail and crash."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import psutil
import pytest
import torch

from tests.gpu import check
from tests.gpu.check import CHECKS, Check, main, table
from tests.gpu.checks import environment, loading, timing, two_ranks
from tests.gpu.checks.decode_speed import CHOICES
from tests.gpu.checks.models import watched_graphs
from tests.gpu.checks.setting import ImpossibleError, Numbers, Setting
from tests.ranks import ROOT

RUNS = ("pythia-410m-staggered", "pythia-410m-sequential")
HERE = "tests.gpu.test_check"
FINE = Check("fine", f"{HERE}:fine", 60, {"number": 7})
NEED_STREAMS = {"loading", "queues"}


def fine(setting: Setting, number: int) -> Numbers:
    """A check that passes."""
    return {"number": number}


def hang(setting: Setting) -> Numbers:
    """A check that never ends, nor does what it has started."""
    child = subprocess.Popen(["sleep", "1000"])
    setting.keep({"child": child.pid})
    child.wait()
    return {}


def fail(setting: Setting) -> Numbers:
    """A check that raises, with numbers kept before."""
    setting.keep({"kept": 1})
    raise ValueError("what was expected did not happen")


def crash(setting: Setting) -> Numbers:
    """A check whose process dies without a word."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def refuse(setting: Setting) -> Numbers:
    """A check that cannot run here."""
    raise ImpossibleError("it needs two moons")


def run(folder: Path, *checks: Check, options: tuple[str, ...] = ()) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and records of a rehearsal of these checks."""
    output = folder / "results" / "check.json"
    code = main(["--rehearse", "--output", str(output), *options], checks)
    return code, json.loads(output.read_text())["records"]


def fake(name: str, limit_s: float = 60) -> Check:
    """One of the checks above."""
    return Check(name, f"{HERE}:{name}", limit_s)


@pytest.mark.ranks
def test_a_rehearsal_runs_every_check_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def written(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        sizes.append(len(json.loads(path.read_text())["records"]))

    write = check.write
    monkeypatch.setattr(check, "write", written)
    code, records = run(tmp_path, *CHECKS)
    failures = [record["error"] for record in records if record["ok"] is False]
    assert (code, failures) == (0, [])
    assert [record["name"] for record in records] == [each.name for each in CHECKS]
    assert sizes == list(range(1, len(CHECKS) + 1)), "the file is not whole after every check"
    assert {record["name"] for record in records if record["ok"] is None} == NEED_STREAMS
    for record in records:
        assert record.keys() == {"name", "ok", "seconds", "numbers", "error"}
        assert (record["error"] is None) == (record["ok"] is True)
        assert record["ok"] is None or record["numbers"]
        assert all(record["numbers"].get("impossible", {"part": "reason"}).values())
    numbers = {record["name"]: record["numbers"] for record in records}
    shares = [numbers["training_speed"][name]["shares"] for name in RUNS]
    assert all(None not in each.values() for each in shares), "operators of a part are named otherwise"
    check_decoding(numbers)
    shown = capsys.readouterr().out
    assert all(each.name in shown for each in CHECKS)
    document = json.loads((tmp_path / "results" / "check.json").read_text())
    assert document.keys() == {"commit", "hardware", "versions", "configuration", "records"}
    assert document["configuration"]["rehearsal"] is True
    assert not list(tmp_path.rglob("*.partial"))


def check_decoding(numbers: dict[str, Any]) -> None:
    """What the rehearsed checks of decoding must have measured, by check."""
    assert len(numbers["decode_speed"]["goals"]) == 6
    assert all(goal["met"] is None for goal in numbers["decode_speed"]["goals"].values())
    assert all(numbers["host"][choice]["steps"] > 5 for choice in CHOICES)
    products = numbers["products"]
    assert products["failed"] == {} and all(tile["gb_s"] > 0 for tile in products["gate_up"]["1"]["tiles"])
    assert numbers["two_ranks_killed"]["says"].startswith("stage 0 (rank 0) lost ")
    one_process = numbers["two_ranks_eager"]["tokens"]
    assert all(numbers[f"two_ranks_{name}"]["tokens"] == one_process for name in ("last", "sharded", "combined"))


def test_without_a_gpu_the_command_says_so_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "check.json"
    assert main(["--output", str(output)], CHECKS) == 2 and not output.exists()
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and "no CUDA device" in shown.err


def test_another_process_is_asked_for_the_name_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(target: str, *arguments: Any) -> list[str]:
        asked.append(target)
        return ["Some GPU"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(check, "run_ranks", answer)
    monkeypatch.setattr(check, "run_checks", lambda *_: [check.Record("one", True, 1.0)])
    assert main(["--output", str(tmp_path / "check.json")], (FINE,)) == 0
    assert json.loads((tmp_path / "check.json").read_text())["hardware"] == "2 x Some GPU"
    assert asked == ["torch.cuda:get_device_name"] and hasattr(torch.cuda, "get_device_name")


@pytest.mark.ranks
def test_a_check_that_hangs_costs_its_limit_and_is_killed_with_its_children(tmp_path: Path) -> None:
    run(tmp_path, FINE)  # what all processes are forks of has started
    began = time.monotonic()
    code, (hung, after) = run(tmp_path, fake("hang", limit_s=2 / check.REHEARSAL_PATIENCE), FINE)
    assert code == 1 and time.monotonic() - began < 10
    assert hung["ok"] is False and "did not end within 2 s" in hung["error"]
    assert after["ok"] is True and after["numbers"] == {"number": 7}
    child = hung["numbers"]["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.ranks
def test_failures_are_recorded_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = (fake("fail"), fake("crash"), fake("refuse"), replace(FINE, name="both", ranks=2))
    code, (failed, crashed, refused, both) = run(tmp_path, *checks)
    assert code == 1
    assert failed["ok"] is False and failed["numbers"] == {"kept": 1}
    assert "ValueError: what was expected did not happen" in failed["error"] and str(ROOT) not in failed["error"]
    assert crashed["ok"] is False and "exit code -11" in crashed["error"]
    assert refused["ok"] is None and refused["error"] == "it needs two moons"
    assert both["ok"] is True and both["numbers"] == {"number": 7}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["fail", "FAILED"], ["crash", "FAILED"], ["refuse", "skipped"], ["both", "passed"]
    ]  # fmt: skip
    assert lines[1].endswith("ValueError: what was expected did not happen")
    assert "exit code -11" in lines[2] and lines[3].endswith("it needs two moons")


@pytest.mark.ranks
def test_the_budget_ends_a_check_and_skips_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SHORTEST_S", 0.1)
    code, (cut, skipped) = run(tmp_path, fake("hang"), FINE, options=("--budget-s", "2"))
    assert code == 0
    assert cut["ok"] is None and "the budget of 2 s ended while it ran" in cut["error"] and cut["seconds"] < 8
    assert skipped["ok"] is None and skipped["error"] == "skipped: the budget of 2 s is used up"


def test_the_checks_fit_into_nine_minutes_with_their_budget() -> None:
    assert check.parse_arguments(["--output", "x"]).budget_s <= 530
    assert len({each.name for each in CHECKS}) == len(CHECKS)


@pytest.mark.ranks
def test_only_chooses_checks_by_the_beginning_of_their_names(tmp_path: Path) -> None:
    others = [replace(FINE, name=name) for name in ("fine_too", "other")]
    _, records = run(tmp_path, FINE, *others, options=("--only", "fine"))
    assert [record["name"] for record in records] == ["fine", "fine_too"]
    with pytest.raises(SystemExit):
        check.parse_arguments(["--output", "x", "--only", "two_ranks", "unknown"])


def test_ranks_that_share_a_gpu_are_told_so_and_get_the_library() -> None:
    both = replace(FINE, ranks=2)
    assert check._variables(both, Setting()) == {}
    assert check._variables(both, Setting(gpus=1))["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert "NCCL_MULTI_RANK_GPU_ENABLE" not in check._variables(both, Setting(gpus=2))
    assert "NCCL_MULTI_RANK_GPU_ENABLE" not in check._variables(FINE, Setting(gpus=1))
    before = os.environ.get("LD_PRELOAD")
    with check._preloaded("/lib/some.so"):
        assert os.environ["LD_PRELOAD"].startswith("/lib/some.so")
    assert os.environ.get("LD_PRELOAD") == before


def test_kernels_are_interpreted_in_a_rehearsal_alone() -> None:
    interpreted = replace(FINE, interpreted=True)
    assert check._variables(interpreted, Setting()) == {"TRITON_INTERPRET": "1"}
    assert "TRITON_INTERPRET" not in check._variables(interpreted, Setting(gpus=1))


def test_ranks_do_not_share_a_gpu_under_an_old_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_ranks, "loaded_nccl", lambda: (2, 28, 9))
    two_ranks.check_ranks_can_meet(Setting(gpus=2))
    with pytest.raises(ImpossibleError, match="NCCL 2.28.9 does not let two ranks share it"):
        two_ranks.check_ranks_can_meet(Setting(gpus=1))
    monkeypatch.setattr(two_ranks, "loaded_nccl", lambda: (2, 30, 0))
    two_ranks.check_ranks_can_meet(Setting(gpus=1))


def test_the_version_of_nccl_is_that_of_the_loaded_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(ncclGetVersion=lambda place: setattr(place._obj, "value", 23102) or 0)  # type: ignore[func-returns-value]
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name, mode: library)
    assert environment.loaded_nccl() == (2, 31, 2)


def test_graphs_are_watched_whoever_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class FakeGraph:
        def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
            calls.append(f"begin {capture_error_mode}")

        def capture_end(self) -> None:
            calls.append("end")

        def replay(self) -> None:
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    graph, own = FakeGraph(), dict(vars(FakeGraph))
    with watched_graphs() as graphs:
        graph.capture_begin(None, capture_error_mode="thread_local")
        graph.capture_end()
        assert graphs.replay_ms("cpu") is None
        graph.replay()
        last: Any = graphs.last
        assert last is graph and graphs.replay_ms("cpu") is not None
    assert len(graphs.capture_ms) == 1 and calls[:3] == ["begin thread_local", "end", "replay"]
    assert dict(vars(FakeGraph)) == own


def test_streams_that_block_each_other_form_groups() -> None:
    assert loading.sharing_groups([[2], [3], [0], [1], []]) == [[0, 2], [1, 3], [4]]
    assert loading.sharing_groups([[1], [], [1]]) == [[0, 1, 2]]


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and events with torch's signatures that do nothing; an event that follows a sleep is never done."""
    kind, slept = torch.cuda.Event, [False]

    def event(enable_timing: bool = False) -> Any:
        made = create_autospec(kind, instance=True)
        made.elapsed_time.return_value = 2.0

        def record(stream: Any = None) -> None:
            made.query.return_value, slept[0] = not slept[0], False

        made.record.side_effect = record
        return made

    monkeypatch.setattr(torch.cuda, "Event", event)
    for name in ("Stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.__setitem__(0, True))
    for name in ("ones", "zeros"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, device, made=made: made(*size))


@pytest.mark.usefixtures("fake_cuda")
def test_the_code_for_events_and_streams_calls_torch_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "STREAMS", 4)
    assert timing.device_ms("cuda:0", lambda: None, calls=4) == 0.5
    timing.host_ms("cuda:0", lambda: None)
    measured = loading._first_launch()
    assert measured["first_launch_waits_for_the_device"] is False
    assert loading._blocked_streams() == [[]] * loading.STREAMS


def test_the_table_has_a_line_for_every_record_and_goal() -> None:
    goals = {"goals": {"speed": {"goal": 1.5, "measured": 1.25, "met": False}}}
    records = [check.Record("one", True, 1.0, goals), check.Record("two", None, 0.0, error="skipped: late")]
    lines = table(records).splitlines()
    assert lines[-2:] == ["MISSED: speed: 1.25, goal 1.5", "1 passed, 0 failed, 1 skipped"] and len(lines) == 5
