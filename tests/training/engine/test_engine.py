"""Resources that an engine keeps: process groups, each of which is a communicator on NCCL, and timers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.saving.save import save_checkpoint
from tests.ranks import run_ranks
from tests.training.parity_cases import Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

pytestmark = pytest.mark.ranks

TRAIN = "tests.training.engine.test_engine:train"


@dataclass
class Kept:
    """Resources of one rank after three steps, an evaluation and a checkpoint.

    Attributes:
        groups: members of every process group of this rank, sorted.
        unused: those that had no traffic.
        timings: entries in DeepSpeed's timers after each step.
    """

    groups: list[tuple[int, ...]]
    unused: list[tuple[int, ...]]
    timings: list[int]


def train(payload: tuple[Case, Path]) -> Kept:
    """Train, evaluate and save."""
    case, folder = payload
    groups = World(60.0).groups(case.grid)
    config = case.config().model_copy(update={"runs_directory": str(folder)})
    engine = build_engine(config, groups)
    timings = []
    for tokens, labels in case.batches():
        engine.train_batch(micro_batches(case, groups, tokens, labels))
        timings.append(_timings(engine))
    engine.eval_batch(micro_batches(case, groups, *case.batches()[0]))
    save_checkpoint(engine, groups, config, TrainingState(3, 24, 800, case.grid))
    # The number of collectives; torch declares it for its backends only.
    operations = {group: group._get_sequence_number_for_group() for group in c10d._world.pg_map}  # type: ignore[attr-defined]
    ranks = {group: tuple(dist.get_process_group_ranks(group)) for group in operations}
    return Kept(sorted(ranks.values()), [ranks[group] for group, number in operations.items() if not number], timings)


def _timings(engine: SectionEngine) -> int:
    return sum(len(timer.event_timers) for timer in engine.timers.get_timers().values())


@pytest.mark.parametrize(("grid", "number"), [((1, 1, 1), 2), ((2, 1, 1), 5), ((2, 2, 2), 8)])
def test_an_engine_makes_only_the_groups_it_uses(grid: tuple[int, int, int], number: int, tmp_path: Path) -> None:
    case = Case("engine", {}, grid)
    reports = run_ranks(TRAIN, case.world_size, (case, tmp_path))
    assert [len(report.groups) for report in reports] == [number] * case.world_size
    assert [report.unused for report in reports] == [[]] * case.world_size
    assert all(report.timings == [0, 0, 0] for report in reports), "timers grow with every step"
    if grid == (2, 2, 2):
        everyone = tuple(range(8))  # default and control
        # Every rank has one group of DeepSpeed's per axis, one for the norm, and two for its edge of the pipeline.
        assert reports[5].groups == [everyone, everyone, (0, 1, 4, 5), (1, 5), (1, 5), (1, 5), (4, 5), (5, 7)]
