"""The training benchmark: what it computes from readings, and one round of it on a model that trains in a moment."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decoding.shapes import sequential_twin
from benchmarks.train import (
    DEFAULT_CONFIG,
    Rounds,
    _check_same_work,
    add_arguments,
    on_real_text,
    one_process_results,
    pipeline_results,
    run,
)
from stagdist.config.loading import load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError, TrainingError
from stagdist.planning.flops import flops_per_token
from tests.benchmarks.tiny import write_tiny

MODEL = """\
max_position_embeddings: 16
section_layers: [1, 1]
tie_word_embeddings: true
"""
RUN = """\
training:
  steps: 1
  global_batch_size: 64
  micro_batch_size: 1
"""
RATIOS = ("pipeline_speedup", "pipeline_speedup_bound", "pipeline_efficiency", "tokens_per_s_vs_torch_pipelining")


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*given, "--device", "cpu"])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.yaml", model=MODEL, rest=RUN)


@pytest.fixture
def config(tiny: Path) -> RunConfig:
    return load_config(tiny)


def readings() -> Rounds:
    """Two rounds with round numbers: one process 8 s, the pipeline 5 s, torch's 5.5 s, the sequential model 7 s."""
    rounds: Rounds = {name: [] for name in ("one_process", "sequential", "pipeline", "torch_pipelining")}
    rounds |= {"stage": [], "stage_busy": []}
    for factor in (1.0, 3.0):  # the machine was three times slower in the second round
        step: dict[str, Any] = {"load_s": 0.02 * factor}
        rounds["one_process"].append([step | {"seconds": 8 * factor}])
        rounds["sequential"].append([{"seconds": 7 * factor}])
        rounds["pipeline"].append([step | {"seconds": 4 * factor}, {"load_s": 0.01, "seconds": 5 * factor}])
        rounds["torch_pipelining"].append([{"seconds": 5.5 * factor}, {"seconds": 5 * factor}])
        rounds["stage"].append([{"seconds": factor}, {"seconds": factor}])
        rounds["stage_busy"].append([{"seconds": 1.25 * factor}, {"seconds": 1.25 * factor}])
    return rounds


def test_ratios_hold_on_a_machine_that_changes_its_speed(config: RunConfig) -> None:
    results = pipeline_results(config, readings(), stages=2, micro_batches=4)
    assert results["pipeline_speedup"] == pytest.approx(1.6)
    assert results["pipeline_speedup_bound"] == pytest.approx(8 / 5)
    assert results["pipeline_efficiency"] == pytest.approx(1.0)
    assert results["pipeline_efficiency_all_busy"] == pytest.approx(1.25)
    assert results["tokens_per_s_vs_torch_pipelining"] == pytest.approx(1.1), "the slowest rank counts"
    assert results["data_wait_share"] == pytest.approx(0.02 / 5)
    assert results["stage_imbalance"] == 0
    assert results["spread"]["pipeline_speedup"]["repeats"] == 2


def test_time_per_flop_allows_the_staggered_model_its_extra_work(config: RunConfig) -> None:
    results = one_process_results(config, readings(), None)
    extra = flops_per_token(config.model, 16) / flops_per_token(sequential_twin(config.model), 16)
    assert extra > 1
    assert results["time_per_flop_vs_sequential"] == pytest.approx(8 / 7 / extra)
    assert results["mfu"] is None, "nobody knows a CPU's peak"
    assert one_process_results(config, readings(), "NVIDIA H200")["mfu"] > 0


def test_the_twin_has_the_same_layers_and_nothing_of_a_stagformer(config: RunConfig) -> None:
    windowed = config.model.model_copy(update={"cross_attention_window": 4, "stagger": 2})
    twin = sequential_twin(windowed)
    assert not twin.staggered
    assert twin.section_layers == windowed.section_layers


def test_contestants_that_compute_something_else_are_refused() -> None:
    right = {"loss": 5.0, "gradient_norm": 2.0}
    round_ = {"one_process": [right], "pipeline": [{}, right], "torch_pipelining": [{}, right]}
    _check_same_work(round_)
    with pytest.raises(TrainingError, match="torch_pipelining and one_process do not do the same work: gradient_norm"):
        _check_same_work(round_ | {"torch_pipelining": [{}, right | {"gradient_norm": 2.1}]})


def test_a_wrong_request_is_refused(tiny: Path, tmp_path: Path, config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="--rounds 0.*none may be below 1"):
        run(arguments("--rounds", "0"))
    with pytest.raises(ConfigError, match="parallel.tensor_parallel_size: 1"):
        run(arguments("--config", str(tiny), "--set", "parallel.tensor_parallel_size=2"))
    with pytest.raises(ConfigError, match="training.precision: fp32"):
        run(arguments("--config", str(tiny), "--set", "training.precision=bf16"))
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 100})})
    with pytest.raises(ConfigError, match="bytes need 257"):
        on_real_text(small, tmp_path, 4, 1, "cpu")


def test_the_default_shape_has_two_stages_and_eight_micro_batches() -> None:
    config = load_config(DEFAULT_CONFIG)
    assert config.pipeline_parallel_size == 2
    assert arguments().micro_batches == 8


@pytest.mark.slow  # the tests above check its parts
@pytest.mark.ranks
def test_one_round_of_real_ranks(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "train.json"
    assert run(arguments("--config", str(tiny), "--rounds", "1", "--micro-batches", "4", "--json", str(output))) == 0
    written = json.loads(output.read_text())
    assert written["processes"] == 2 and written["threads_per_process"] == 1 and written["num_micro_batches"] == 4
    printed = capsys.readouterr().out
    for name in (*RATIOS, "time_per_flop_vs_sequential", "data_wait_share", "startup_s"):
        assert written[name] > 0 and name in printed
    assert 1 <= written["pipeline_speedup_bound"] <= 2
    assert len(written["stage_times_s"]) == len(written["stage_times_all_busy_s"]) == 2
    assert set(written) >= {"commit", "hardware", "versions", "device", "rounds", "config", "spread"}
    assert str(tmp_path) not in output.read_text(), "a record says nothing about the machine's folders"
