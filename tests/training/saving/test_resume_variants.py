"""A resumed run computes the same bits as one that was never stopped. Covers variants of the default model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.run_config import RunConfig
from stagdist.parallel.groups import Groups
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.saving.resume import load_checkpoint, newest_complete
from stagdist.training.saving.save import save_checkpoint
from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS
from tests.training.comparison import on_device
from tests.training.parity_cases import LEARNING_RATES, Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

pytestmark = pytest.mark.ranks

WORKER = "tests.training.saving.test_resume_variants:resume_cases"
TIMEOUT_S = 120.0
STEPS = len(LEARNING_RATES)
OTHER_SEED = 99

RESUMED_CASES = [
    Case("bf16, tied and shared on 2x1x1", VARIANTS["shared"] | {"tie_word_embeddings": True}, (2, 1, 1),
         precision="bf16"),
    Case("combined on 1x2x1", VARIANTS["combined"], (1, 2, 1)),
    Case("two tensor ranks on 2x1x2", {}, (2, 1, 2)),
]  # fmt: skip


@dataclass
class Continuation:
    """One rank's results of the steps after the save.

    Attributes:
        losses: of these steps.
        parameters: after the last of them.
    """

    losses: list[float]
    parameters: dict[str, Tensor]


@dataclass
class Report:
    """One rank's view of a case: the run that continued, and the one that was resumed."""

    continued: Continuation
    resumed: Continuation
    fresh: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of the second engine before it loaded anything."""
    state: TrainingState | None = None


def resume_cases(payload: tuple[list[Case], Path]) -> dict[str, Report]:
    """Run all cases in one world; reports by the case's name. `payload`: cases, and a folder shared by the ranks."""
    cases, folder = payload
    world, reports = World(TIMEOUT_S, deterministic=any(case.deterministic for case in cases)), {}
    for case in sorted(cases, key=lambda case: case.grid):
        runs = folder / case.name.replace(" ", "-")
        config = case.config().model_copy(update={"runs_directory": str(runs)})
        reports[case.name] = _save_and_resume(case, config, world.groups(case.grid))
    return reports


def _save_and_resume(case: Case, config: RunConfig, groups: Groups) -> Report:
    engine = build_engine(config, groups)
    _train(engine, case, groups)
    samples = STEPS * config.training.global_batch_size
    grid = groups.grid
    state = TrainingState(STEPS, samples, 2 * samples, (grid.pipe, grid.data, grid.tensor))
    saved = save_checkpoint(engine, groups, config, state)
    continued = _train(engine, case, groups)

    # With another seed, equal weights can only come from the checkpoint.
    other = config.model_copy(update={"training": config.training.model_copy(update={"seed": OTHER_SEED})})
    second = build_engine(other, groups)
    fresh = _parameters(second)
    newest = newest_complete(Path(config.folder) / "checkpoints", groups)
    assert newest == saved, f"saved {saved}, found {newest}"
    state_read = load_checkpoint(second, groups, config.model, newest)
    return Report(continued, _train(second, case, groups), fresh, state_read)


def _train(engine: SectionEngine, case: Case, groups: Groups) -> Continuation:
    """Train the steps of the case."""
    losses = []
    for rate, (tokens, labels) in zip(LEARNING_RATES, case.batches(), strict=True):
        engine.set_learning_rate(rate)
        losses.append(float(engine.train_batch(micro_batches(case, groups, tokens, labels))))
    return Continuation(losses, _parameters(engine))


def _parameters(engine: SectionEngine) -> dict[str, Tensor]:
    named = engine.module.canonical_parameters().items()
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in named}


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the ranks save."""
    yield tmp_path_factory.mktemp("resumed")
    launch.cache_clear()


@cache
def launch(world_size: int, device: str, folder: Path) -> list[dict[str, Report]]:
    """One launch for all cases of a world size."""
    cases = [case for case in RESUMED_CASES if case.world_size == world_size]
    return run_ranks(WORKER, world_size, (cases, folder), timeout_s=200, env=on_device(device))


def check_resumed(reports: list[Report]) -> None:
    """The resumed run equals the other one bit by bit, and without its checkpoint it would not."""
    for rank, report in enumerate(reports):
        assert report.state is not None and report.state.step == STEPS
        assert report.resumed.losses == report.continued.losses, f"losses on rank {rank}"
        expected, found = report.continued.parameters, report.resumed.parameters
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], f"rank {rank}"
        matrices = [name for name in expected if expected[name].ndim == 2]
        assert matrices and not any(torch.equal(report.fresh[name], expected[name]) for name in matrices)


@pytest.mark.parametrize("case", RESUMED_CASES, ids=lambda case: case.name)
def test_steps_after_a_resume_are_bit_equal(case: Case, shared_folder: Path) -> None:
    check_resumed([rank[case.name] for rank in launch(case.world_size, case.device, shared_folder)])
