"""The configurations that come with the project."""

from pathlib import Path

import pytest

from stagdist.config.loading import load_config
from stagdist.planning.dry_run import dry_run
from stagdist.planning.plan import Plan, plan

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def planned(name: str) -> Plan:
    return plan(load_config(next(path for path in CONFIGS if path.stem == name)), 64)


def test_the_promised_configurations_are_there() -> None:
    promised = {"quickstart", "paper-baseline-18l-1.6b", "paper-baseline-36l-2.8b", "paper-stagformer-2x18-2.9b"}
    promised |= {"paper-stagformer-shared-2x18", "p4-combined"}
    promised |= {f"pythia-{size}-{kind}" for size in ("160m", "410m") for kind in ("sequential", "staggered")}
    assert promised <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_plans_at_64_ranks(path: Path) -> None:
    text, code = dry_run(path, (), 64)
    assert code == 0, text[-2000:]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_says_what_it_is_and_is_named_after_its_file(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    "name, billions",
    [
        ("paper-baseline-18l-1.6b", 1.6),
        ("paper-baseline-36l-2.8b", 2.8),
        ("paper-stagformer-2x18-2.9b", 2.9),
        ("pythia-160m-sequential", 0.1623),
        ("pythia-410m-sequential", 0.4053),
    ],
)
def test_published_sizes_are_met(name: str, billions: float) -> None:
    assert planned(name).parameters / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_papers_step_has_its_tokens() -> None:
    run = planned("paper-stagformer-2x18-2.9b")
    assert run.tokens_per_step * run.config.training.steps == pytest.approx(327e9, rel=0.01)


def test_both_connections_of_a_pythia_size_have_the_same_layers() -> None:
    for size in ("160m", "410m"):
        staggered = load_config(next(p for p in CONFIGS if p.stem == f"pythia-{size}-staggered"))
        sequential = load_config(next(p for p in CONFIGS if p.stem == f"pythia-{size}-sequential"))
        assert staggered.training == sequential.training and staggered.optimizer == sequential.optimizer
        assert staggered.model.model_copy(update={"connection": "sequential"}) == sequential.model
