"""The ranks of the tests of resuming: train and save on one grid, resume on another."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.config.run_config import RunConfig
from stagdist.parallel.grid import Coordinate
from stagdist.parallel.groups import Groups
from stagdist.training.engine.deepspeed_adapter import owned_part
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.saving.engine_state import load_tensors
from stagdist.training.saving.resume import load_checkpoint, newest_complete
from stagdist.training.saving.save import save_checkpoint
from tests.training.parity_cases import GLOBAL_BATCH, SEQUENCE, Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

TIMEOUT_S = 120.0
LEARNING_RATE = 1e-3
OTHER_SEED = 99


@dataclass(frozen=True)
class Leg:
    """One part of a journey.

    Attributes:
        case: model and grid.
        runs: folder of all runs.
        name: of the run whose checkpoint is written or read.
        steps: steps before the save, and as many after it.
    """

    case: Case
    runs: Path
    name: str
    steps: int

    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.case.config().model_copy(update={"runs_directory": str(self.runs), "name": self.name})


@dataclass
class LegReport:
    """The results of one rank.

    Attributes:
        place: coordinate of the rank.
        parameters: at the checkpoint, as saved or as loaded.
        losses: of the steps after the checkpoint.
        step: in the checkpoint.
        read_bytes, share_bytes: what loading read, and the fp32 values of this rank's weights with the moments that
            ZeRO-1 gives to it; 0 for the leg that saves.
    """

    place: Coordinate
    parameters: dict[str, Tensor]
    losses: list[float]
    step: int
    read_bytes: int = 0
    share_bytes: int = 0


def save_legs(legs: list[Leg]) -> list[LegReport]:
    """Train, save, and continue without a stop."""
    world = World(TIMEOUT_S)
    return [_save(leg, world.groups(leg.case.grid)) for leg in legs]


def resume_legs(legs: list[Leg]) -> list[LegReport]:
    """Resume from each leg's checkpoint, which may be of another grid."""
    world = World(TIMEOUT_S)
    return [_resume(leg, world.groups(leg.case.grid)) for leg in legs]


def _save(leg: Leg, groups: Groups) -> LegReport:
    engine = build_engine(leg.config(), groups)
    _train(engine, leg, groups, 0)
    samples = leg.steps * GLOBAL_BATCH
    save_checkpoint(engine, groups, leg.config(), TrainingState(leg.steps, samples, 2 * samples, leg.case.grid))
    parameters = _parameters(engine)
    return LegReport(groups.place, parameters, _train(engine, leg, groups, leg.steps), leg.steps)


def _resume(leg: Leg, groups: Groups) -> LegReport:
    config = leg.config()
    # With another seed, equal weights can only come from the checkpoint.
    other = config.model_copy(update={"training": config.training.model_copy(update={"seed": OTHER_SEED})})
    engine = build_engine(other, groups)
    checkpoint = newest_complete(Path(config.folder) / "checkpoints", groups)
    assert checkpoint is not None
    state = load_checkpoint(engine, groups, config.model, checkpoint)
    parameters = _parameters(engine)
    reader = TrainingReader(checkpoint)
    load_tensors(engine, groups, config.model, reader)
    held = engine.module.canonical_parameters().values()
    owned = [part for part in map(owned_part, held) if part is not None]
    share = 4 * sum(value.numel() for value in held) + 8 * sum(part.stop - part.start for part in owned)
    losses = _train(engine, leg, groups, state.step)
    return LegReport(groups.place, parameters, losses, state.step, reader.bytes_read, share)


def _train(engine: SectionEngine, leg: Leg, groups: Groups, first: int) -> list[float]:
    losses = []
    for step in range(first, first + leg.steps):
        generator = torch.Generator().manual_seed(step)
        vocabulary = leg.case.model_keys["vocab_size"]
        tokens = torch.randint(vocabulary, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
        engine.set_learning_rate(LEARNING_RATE)
        batches = micro_batches(leg.case, groups, tokens[:, :-1], tokens[:, 1:].contiguous())
        losses.append(float(engine.train_batch(batches)))
    return losses


def _parameters(engine: SectionEngine) -> dict[str, Tensor]:
    named = engine.module.canonical_parameters().items()
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in named}
