"""The decode benchmark: what it computes from readings, and a whole run over two real processes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks.common.command import main
from benchmarks.common.conditions import OtherPrograms
from benchmarks.decode import DEFAULT_CONFIG, add_arguments, run, settings_from
from benchmarks.decoding import contestants
from benchmarks.decoding.bounds import bound_s, step_bytes
from benchmarks.decoding.contestants import DROPPED_STEPS, EngineContestant, Load, Served, alternate
from benchmarks.decoding.measurement import check_same_tokens, ratios
from benchmarks.decoding.plain_step import _receive
from benchmarks.decoding.shapes import balanced_split, default_splits, even_split, parse_split
from benchmarks.decoding.site import DecodeSite
from benchmarks.decoding.sweeps import parse_axis
from stagdist.config.loading import load_config
from stagdist.decode.layers.weights import Device, random_reader
from stagdist.decode.runtime.build import EngineOptions, build_stage, plan_decoding
from stagdist.errors import ConfigError, StagdistError
from tests.benchmarks.tiny import write_tiny
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
MODEL = """\
max_position_embeddings: 128
section_layers: [2, 2]
"""
RUN = """\
training: {steps: 1, global_batch_size: 4, micro_batch_size: 1}
data: {corpora: [{prefix: x}]}
"""
QUICK = ("--rounds", "1", "--steps", "8", "--context", "24", "--prefill", "48", "--device", "cpu")


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(given))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_tiny(tmp_path / "tiny.yaml", model=MODEL, rest=RUN))


# --- shapes, loads, bounds --------------------------------------------------------------------------------------


def test_splits_are_even_balanced_and_of_equal_depth() -> None:
    model = load_config(DEFAULT_CONFIG).model
    assert [even_split(16, count) for count in (2, 3)] == [(8, 8), (6, 5, 5)]
    assert default_splits(model, 2) == [(8, 8), (9, 7), (10, 6), (11, 5)]
    for sections in (2, 3, 4):
        split = balanced_split(model, sections)
        assert sum(split) == 16 and split[0] == max(split) and split[-1] == min(split)
    assert parse_split("10+6") == (10, 6)
    for wrong in ("10+", "ten", "16-0", "0+16"):
        with pytest.raises(ConfigError, match="no section split"):
            parse_split(wrong)


def test_the_measured_steps_lie_around_the_context() -> None:
    load = Load(context=256, steps=40)
    middle = load.prompt_length + DROPPED_STEPS + load.steps // 2
    assert middle == 256
    assert load.new_tokens == 1 + DROPPED_STEPS + 40
    assert load.prompt(50) == load.prompt(50) != load.prompt(50, seed=1)


def test_every_measured_step_decodes_all_requests_of_a_batch(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first one would have ended while the prompts of the others are computed."""
    model, load, decoded = load_config(tiny).model, Load(context=10, steps=3, batch=12), []
    take = contestants._TimedEngine._take

    def noted(engine: contestants._TimedEngine, rows: Any, choice: Any) -> None:
        take(engine, rows, choice)
        decoded.append((engine._admitted, len(rows)))

    monkeypatch.setattr(contestants._TimedEngine, "_take", noted)
    options = EngineOptions(max_context=load.length, num_slots=load.batch)
    served = EngineContestant(DecodeSite(None, "cpu", 1, 60.0), model, options)(load)
    assert len(served.step_s) == load.steps and len(served.token_ids) == load.new_tokens
    together = [rows for admitted, rows in decoded if admitted == load.batch]
    assert together[: DROPPED_STEPS + load.steps] == [load.batch] * (DROPPED_STEPS + load.steps)


def test_a_step_reads_every_weight_but_the_embedding_and_the_cache_up_to_its_position(tiny: str) -> None:
    model = load_config(tiny).model
    options = EngineOptions(max_context=64, num_slots=2)
    stage = build_stage(plan_decoding(model, options, 1), random_reader(0), "cpu", None)
    tensors = sum(tensor.nbytes for tensor in stage.weights.tensors())
    assert stage.weights.embedding is not None
    one, both = step_bytes(stage, 16, 1), step_bytes(stage, 16, 2)
    assert one["weights_bytes"] == both["weights_bytes"] == tensors - stage.weights.embedding.nbytes
    held = stage.kv_bytes * 64 // 65  # one entry of every cache holds no position
    assert both["cache_bytes"] == 2 * one["cache_bytes"] == held // 4
    assert step_bytes(stage, 10_000, 2)["cache_bytes"] == held


def test_stages_that_take_turns_add_up_and_others_wait_for_the_slowest() -> None:
    read = [100, 200]
    assert bound_s(read, [10.0, 10.0], sequential=False, stages=2) == 20.0
    assert bound_s(read, [10.0, 10.0], sequential=True, stages=2) == 30.0
    assert bound_s(read, [10.0, 10.0], sequential=False, stages=1) == 20.0


# --- readings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lap", [None, lambda phase: None])
def test_an_engine_whose_phases_are_timed_runs_without_graphs(tiny: str, lap: Callable[[str], None] | None) -> None:
    model = load_config(tiny).model
    engine = EngineContestant(DecodeSite(None, "cpu", 1, 60.0), model, EngineOptions(max_context=8), lap=lap)
    assert engine.options.graphs is (None if lap is None else False)


@pytest.mark.parametrize(("device", "early"), [("cpu", 1), ("cuda:0", 0)])
def test_the_plain_step_posts_a_receive_early_on_gloo_and_where_it_is_waited_for_on_nccl(
    monkeypatch: pytest.MonkeyPatch, device: str, early: int
) -> None:
    posted: list[Mock] = []

    def irecv(tensor: torch.Tensor, peer: int, group: str) -> Mock:
        posted.append(Mock(place=(peer, group)))
        return posted[-1]

    monkeypatch.setattr(torch.distributed, "irecv", irecv)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    stage: Any = Mock(device=Device(device, torch.float32))
    edges: Any = {(0, 1): "edge"}
    wait = _receive(stage, torch.zeros(1), 0, edges)
    assert len(posted) == early
    wait()
    (work,) = posted
    assert work.place == (0, "edge")
    work.wait.assert_called_once()


def test_ratios_are_taken_within_rounds() -> None:
    readings: dict[str, list[Any]] = {"staggered": [], "sequential pipeline": [], "plain": []}
    for slow in (1.0, 5.0):
        readings["staggered"].append(Served((2 * slow,) * 3, (1, 2)))
        readings["sequential pipeline"].append(Served((3 * slow, 3 * slow, 90.0)))
        readings["plain"].append(Served((1.9 * slow,), (1, 2)))
    found = ratios(readings)
    assert found["speedup_vs_sequential_pipeline"] == pytest.approx(1.5)
    assert found["plain_torch_step_over_engine_step"] == pytest.approx(0.95)
    assert found["prefill_speedup_vs_one_process"] is None, "it was not measured"
    check_same_tokens(readings)
    readings["plain"][1] = Served((1.0,), (1, 3))
    with pytest.raises(StagdistError, match="different tokens, first at 1: 3 and 2"):
        check_same_tokens(readings)


def test_rounds_that_other_programs_disturb_are_run_again_but_not_for_ever() -> None:
    shares = iter([0.0, 0.5, 0.0, 0.0])
    ran: list[str] = []

    def contestant(name: str) -> Callable[[], int]:
        def run_once() -> int:
            ran.append(name)
            return len(ran)

        return run_once

    both = {name: contestant(name) for name in "ab"}
    readings = alternate(both, 2, lambda text: None, lambda: next(shares))
    assert "".join(ran) == "ababba", "the disturbed round again in its own order, odd rounds backwards"
    assert readings == {"a": [3, 6], "b": [4, 5]}
    assert len(alternate({"a": lambda: 1}, 2, lambda text: None, lambda: 1.0)["a"]) == 2


def test_the_share_of_other_programs_leaves_out_our_own_work() -> None:
    busy = iter([100.0, 1e9])
    others = OtherPrograms(lambda seconds: seconds, lambda: next(busy))
    assert others.share() > 1e3
    assert OtherPrograms(lambda seconds: seconds, lambda: None).share() == 0.0


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("--steps", "2"), "--steps 2 is too small"),
        (("--batch", "0"), "--batch 0 is too small"),
        (("--prefill", "-3"), "--prefill -3 is too small"),
        (("--timeline", "a.jpg"), "give a name that ends in .png"),
        (("--splits", "3+3"), r"3\+3 has 6 layers and the model 4"),
        (("--splits", "2+1+1"), "2 stages cannot hold 3 sections"),
        (("--heads", "both"), "give last or sharded"),
        (("--json", "/proc"), "--json /proc is a folder"),
        (("--timeline", "/proc/none/a.png"), "--timeline /proc/none/a.png cannot be written"),
        (("--context", "127"), "needs 148 positions and the model knows 128"),
        (("--prefill", "128"), "--prefill 128 leaves no room in 128 positions"),
        (("--precision", "int8"), "precision is 'int8'"),
        (("--sweep", "color=1"), "'color' is no axis"),
        (("--sweep", "batches=many"), "give integers separated by commas"),
        (("--sweep", "stagger=3"), "a stagger of 0, 1 or 2"),
        (("--sweep", "sections=3"), "4 layers on 2 processes"),
        (("--set", "model.connection=sequential"), "give a staggered shape"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tiny: str, given: tuple[str, ...], problem: str) -> None:
    defaults = ("--config", tiny, "--context", "24", "--prefill", "32")
    with pytest.raises(ConfigError, match=problem):
        settings_from(arguments(*defaults, *given), 2)


def test_axes_of_a_sweep_are_read() -> None:
    assert parse_axis("windows=none,128") == ("windows", (None, 128))
    assert parse_axis("stagger=0,2") == ("stagger", (0, 2))


def test_other_numbers_of_processes_get_sections_of_their_own(tiny: str) -> None:
    given = arguments("--config", tiny, *QUICK)
    assert settings_from(given, 4)[0].splits == ((1, 1, 1, 1),)
    assert settings_from(given, 1)[0].splits == ((2, 2),)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("2", "error: --steps 2 is too small; steps start at 6, --prefill at 0, the others at 1\n"),
        ("few", "error: argument --steps: invalid int value: 'few' (see --help)\n"),
    ],
)
def test_a_wrong_command_is_answered_in_one_line_by_one_rank(
    steps: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, expected in (("0", problem), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main("", add_arguments, run, [f"--local_rank={rank}", "--steps", steps]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", expected)


def run_both(payload: dict[str, Any]) -> int:
    """On every rank: the benchmark itself."""
    return run(arguments(*payload["arguments"]))


@pytest.mark.slow  # the tests above check its parts
@pytest.mark.ranks
def test_a_run_over_two_processes_measures_everything(tiny: str, tmp_path: Path) -> None:
    written = {name: str(tmp_path / "out" / name) for name in ("decode.json", "decode.trace", "decode.png")}
    files = ("--json", written["decode.json"], "--trace", written["decode.trace"], "--timeline", written["decode.png"])
    sweep = ("--sweep", "stagger=0,1", "windows=none,8", "batches=2", "--splits", "2+2,3+1")
    run_ranks("tests.benchmarks.test_decode:run_both", 2, {"arguments": ["--config", tiny, *QUICK, *files, *sweep]})
    results = json.loads(Path(written["decode.json"]).read_text())
    for name in ("ms_per_token", "ms_per_token_p90", "tokens_per_s", "speedup_vs_sequential_pipeline"):
        assert results[name] > 0
    assert results["speedup_vs_sequential_tensor_parallel"] > 0
    assert results["processes_per_core"] == 2 / results["cores"]
    assert results["plain_torch_step_over_engine_step"] > 0, "plain and engine chose the same tokens"
    assert results["prefill_speedup_vs_one_process"] > 0 and 0 < results["slowest_stage_compute_share"] < 1
    assert results["best_split"] in ("2+2", "3+1") and not results["left_out"]
    assert {row["name"] for row in results["splits"]} == {"sequential pipeline"} | {
        f"staggered {split} {head}" for split in ("2+2", "3+1") for head in ("last", "sharded")
    }
    for row in results["splits"]:
        assert row["bound_ms"] > 0 and len(row["memory_bandwidth_share"]) == len(row["memory"]) == 2
    for stages in results["breakdown"].values():
        assert [stage["stage"] for stage in stages] == [0, 1]
        assert all(stage["self_attention_ms"] > 0 and stage["mlp_ms"] > 0 for stage in stages)
        assert stages[0]["head_ms"] == 0 or results["best_head"] == "sharded"
        assert stages[1]["head_ms"] > 0
    assert results["breakdown"]["staggered"][1]["cross_attention_ms"] > 0
    assert {row["stagger"] for row in results["sweeps"]["stagger"]} == {0, 1}
    assert str(tmp_path) not in json.dumps(results), "a record says nothing about the machine's folders"
    check_trace(json.loads(Path(written["decode.trace"]).read_text())["traceEvents"])
    assert Path(written["decode.png"]).read_bytes().startswith(b"\x89PNG")


def check_trace(events: list[dict[str, Any]]) -> None:
    """Both ranks on one clock: a rank's token is received after the other began to send it."""
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1}
    sent = {event["args"]["step"]: event for event in spans if event["name"] == "publish token"}
    received = {event["args"]["step"]: event for event in spans if event["name"] == "wait for token"}
    assert sent.keys() & received.keys() or not sent
    for step in sent.keys() & received.keys():
        assert received[step]["ts"] + received[step]["dur"] >= sent[step]["ts"]


@pytest.mark.ranks
def test_one_process_measures_all_sections_in_one(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    run_ranks(
        "tests.benchmarks.test_decode:run_both", 1, {"arguments": ["--config", tiny, *QUICK, "--json", str(path)]}
    )
    results = json.loads(path.read_text())
    assert results["processes"] == 1 and results["best_split"] == "2+2"
    assert results["speedup_vs_sequential_pipeline"] > 0 and results["prefill_speedup_vs_one_process"] is None
