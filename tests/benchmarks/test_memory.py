"""The memory benchmark, on a model that trains in a moment."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.memory import RankResult, add_arguments, run
from stagdist.errors import ConfigError

TINY = """
name: tiny
model:
  vocab_size: 4000
  hidden_size: 64
  intermediate_size: 128
  num_attention_heads: 2
  max_position_embeddings: 64
  section_layers: [2, 1]
training:
  steps: 10
  global_batch_size: 4
  micro_batch_size: 2
parallel:
  pipeline_parallel_size: 2
"""


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*given, "--device", "cpu"])


@pytest.mark.ranks
@pytest.mark.usefixtures("forked_workers")
def test_real_ranks_have_the_planned_parameters_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, output = tmp_path / "tiny.yaml", tmp_path / "memory.json"
    config.write_text(TINY)
    assert run(arguments("--config", str(config), "--json", str(output))) == 0
    written = json.loads(output.read_text())
    (case,) = written["cases"]
    assert [rank["stage"] for rank in case["ranks"]] == [0, 1]
    for rank in case["ranks"]:
        assert rank["planned_parameters"] == rank["engine_parameters"]
        assert rank["measured_bytes"] == max(rank["peaks_by_phase"].values()) == rank["peaks_by_phase"]["step 2"]
        assert rank["predicted_bytes"] == pytest.approx(rank["measured_bytes"], rel=0.15)
    assert set(written) >= {"commit", "hardware", "versions", "device", "steps"}
    assert len(capsys.readouterr().out.splitlines()) == 3, "a header and a line for each rank"


def test_a_result_holds_when_parameters_are_exact_and_the_peak_is_near() -> None:
    result = RankResult(0, 0, 100, 100, 1140, "backward pass", 1000, {"step 2": 1000})
    assert result.holds
    assert not replace(result, engine_parameters=99).holds
    assert not replace(result, predicted_bytes=1160).holds
    assert not replace(result, predicted_bytes=840).holds


def test_a_wrong_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="'fp64' is none of 'fp32'"):
        run(arguments("--case", "fp64"))
    with pytest.raises(ConfigError, match="at least 2"):
        run(arguments("--steps", "1"))
    for option in (("--set", "a=1"), ("--world-size", "0")):
        with pytest.raises(ConfigError, match="change the run of --config"):
            run(arguments(*option))
