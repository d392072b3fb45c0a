"""The benchmark of saving: its arithmetic, and that it measures real ranks."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.save import Round, add_arguments, figures, run
from stagdist.errors import ConfigError
from tests.benchmarks.tiny import write_tiny


def answer(seconds: float, steps_s: float, save_s: float = 0.0, finish_s: float = 0.0) -> dict[str, Any]:
    return {
        "seconds": seconds, "steps_s": steps_s, "save_s": save_s, "finish_s": finish_s, "steps": 4,
        "complete_after": 2, "bytes": 1000,
    }  # fmt: skip


def test_lost_time_is_that_of_the_slowest_rank_over_the_same_steps_without_a_save() -> None:
    rounds: list[Round] = [
        {
            "plain": [answer(4.0, 4.0), answer(3.9, 3.9)],
            "synchronous": [answer(5.0, 4.0, 1.0), answer(5.0, 4.0, 0.9)],
            "asynchronous": [answer(4.5, 4.3, 0.1, 0.05), answer(4.4, 4.2, 0.05, 0.02)],
            "load": [{"seconds": 0.5}, {"seconds": 0.7}],
        }
    ]
    found = figures(rounds, rounds[0])
    assert found["synchronous_save_s"]["median"] == 1.0
    assert found["load_s"]["median"] == 0.7
    assert found["asynchronous_pause_s"]["median"] == pytest.approx(0.15)
    assert found["asynchronous_slower_steps_s"]["median"] == pytest.approx(0.3)
    assert found["lost_s"]["asynchronous"]["median"] == pytest.approx(0.5)
    assert found["ratio_of_pauses"]["median"] == pytest.approx(0.15)
    assert found["ratio_of_lost_time"]["median"] == pytest.approx(0.5)
    assert found["step_s"]["median"] == 1.0 and found["first_save"]["synchronous_save_s"] == 1.0


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*given, "--device", "cpu"])


@pytest.mark.ranks
@pytest.mark.usefixtures("forked_workers")
def test_real_ranks_save_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = "training: {steps: 50, global_batch_size: 2, micro_batch_size: 1}\n"
    model = "max_position_embeddings: 16\nsection_layers: [1, 1]\n"
    config, output = write_tiny(tmp_path / "tiny.yaml", model=model, rest=rest), tmp_path / "save.json"
    given = ["--config", str(config), "--rounds", "2", "--steps", "3", "--json", str(output), "--folder", str(tmp_path)]
    assert run(arguments(*given)) == 0
    written = json.loads(output.read_text())
    assert written["bytes_per_rank"] > 100_000 and written["world_size"] == 2 and len(written["rounds"]) == 2
    for number in written["rounds"]:
        for rank in range(2):
            assert number["load"][rank]["seconds"] > 0
            assert number["plain"][rank]["save_s"] < 0.01 < number["synchronous"][rank]["save_s"]
            assert number["synchronous"][rank]["complete_after"] == 0 < number["asynchronous"][rank]["complete_after"]
    assert "pause over a synchronous save" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["save.json", "tiny.yaml"]


def test_a_wrong_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        run(arguments("--rounds", "0"))
    with pytest.raises(ConfigError, match="--set a=1 changes a key of --config"):
        run(arguments("--set", "a=1"))
    with pytest.raises(ConfigError, match="world size 0"):
        run(arguments("--world-size", "0"))
