"""The benchmark of upcycling: its arithmetic, and that what it would train can be trained."""

import argparse
from pathlib import Path

import pytest

from benchmarks.recovery import CONTESTANTS, Study, add_arguments, best, figures, run
from stagdist.config.loading import load_config
from stagdist.errors import ConfigError, TrainingError


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def test_the_best_of_a_source_is_its_lowest_median_at_the_end() -> None:
    seeds = [
        {"baseline": 3.0 + seed, "curves": [{25: 9.0, 50: 1.0 * place + seed} for place in range(len(CONTESTANTS))]}
        for seed in range(3)
    ]
    found = figures(seeds)
    assert found["baseline_validation_loss"]["median"] == 4.0
    assert found["contestants"][2]["validation_loss"]["50"]["median"] == 3.0
    first = {one.source: place for place, one in reversed(list(enumerate(CONTESTANTS)))}
    assert best(found) == {source: place + 1.0 for source, place in first.items()}


@pytest.mark.parametrize("connection", ["sequential", "staggered"])
def test_what_it_trains_are_configurations_that_load(tmp_path: Path, connection: str) -> None:
    model = {"connection": connection, "section_layers": [2, 2]}
    path = Study(tmp_path, 600, 150)._config("run", model, seed=2, rate=1e-3, steps=150, interval=25)
    config = load_config(str(path), [])
    assert (config.training.seed, config.data.seed, config.evaluation.interval_steps) == (2, 2, 25)
    assert config.model.connection == connection and config.scheduler.warmup_steps == 15


def test_wrong_options_and_a_failed_command_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--steps must be a multiple of 6"):
        run(arguments("--steps", "25"))
    with pytest.raises(ConfigError, match="--seeds"):
        run(arguments("--seeds", "0"))
    with pytest.raises(ConfigError, match="--text .*nowhere does not exist"):
        run(arguments("--text", str(tmp_path / "nowhere")))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TrainingError, match=r"train_tokenizer.* ended with 2: .*empty.txt"):
        run(arguments("--folder", str(tmp_path), "--text", str(tmp_path / "empty.txt")))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
