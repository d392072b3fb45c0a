"""The score of held-out text that a run reports is the score of its published model."""

import math
import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stagdist.checkpoint.published.load_model import load_model
from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.run_config import RunConfig
from stagdist.data.corpus import Splits, build_splits
from stagdist.data.loader import BatchPlan, Loader
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.model.megatron import TensorParallel
from stagdist.parallel.groups import single_process
from stagdist.telemetry.score import TextScore
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.held_out import HeldOut
from stagdist.training.publish import publish_model
from stagdist.training.saving.save import save_checkpoint
from tests.ranks import GUARD_S, run_ranks
from tests.training.worlds import World

pytestmark = pytest.mark.ranks

GRIDS = [(2, 1, 1), (1, 2, 1), (3, 1, 1)]
NUM_BATCHES = 3
GLOBAL_BATCH = 8
STEPS = 2


@dataclass(frozen=True)
class Task:
    """Input of the ranks: a prepared corpus, and a folder for their models."""

    prefix: Path
    folder: Path

    def config(self, grid: tuple[int, int, int]) -> RunConfig:
        """The run on one grid."""
        values: dict[str, Any] = {
            "name": "held-out",
            "model": {
                "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
                "max_position_embeddings": 32, "section_layers": [1] * max(2, grid[0]),
            },
            "parallel": {"pipeline_parallel_size": grid[0]},
            "data": {
                "tokenizer": "bytes", "corpora": [{"prefix": str(self.prefix)}], "split": [80, 10, 10],
                "cache_directory": str(self.folder / "cache"),
            },
            "training": {"steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2},
            "evaluation": {"num_batches": NUM_BATCHES},
        }  # fmt: skip
        return RunConfig.model_validate(values)

    def splits(self, config: RunConfig) -> Splits:
        """The data sets of the run."""
        return build_splits(
            config.data,
            sequence_length=config.sequence_length,
            num_samples=(STEPS * GLOBAL_BATCH, 0, NUM_BATCHES * GLOBAL_BATCH),
            tokenizer=byte_tokenizer(),
            vocab_size=config.model.vocab_size,
        )

    def model_directory(self, grid: tuple[int, int, int]) -> Path:
        """Where the model trained on a grid is left."""
        return self.folder / "x".join(map(str, grid))


def score_on_grids(task: Task) -> dict[tuple[int, int, int], TextScore]:
    """Train some steps on every grid of this world, score the test split twice, leave the model; scores by grid."""
    world, scores = World(GUARD_S), {}
    for grid in [grid for grid in GRIDS if math.prod(grid) == int(os.environ["WORLD_SIZE"])]:
        groups, config = world.groups(grid), task.config(grid)
        splits = task.splits(config)
        engine = build_engine(config, groups)
        plan = BatchPlan(GLOBAL_BATCH, 2, groups.place.data, groups.grid.data)
        _train(engine, splits, plan)
        held_out = HeldOut(splits.test, plan, config.evaluation, byte_tokenizer().token_bytes())
        scores[grid] = held_out.score(engine)
        assert held_out.score(engine) == scores[grid], "the same model gives the same sequences another score"
        run = config.model_copy(update={"runs_directory": str(task.model_directory(grid)) + "-run"})
        saved = save_checkpoint(engine, groups, run, TrainingState(STEPS, STEPS * GLOBAL_BATCH, 1, grid))
        publish_model(engine, groups, config.model, saved, byte_tokenizer(), task.model_directory(grid))
    return scores


def _train(engine: SectionEngine, splits: Splits, plan: BatchPlan) -> None:
    loader = Loader(splits.train, plan)
    engine.set_learning_rate(1e-2)
    for step in range(STEPS):
        engine.train_batch(loader.step(step * GLOBAL_BATCH))
    loader.close()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A byte corpus of some real files."""
    folder = tmp_path_factory.mktemp("held-out")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    prepare([str(path) for path in files], str(folder / "corpus"), byte_tokenizer())
    return Task(folder / "corpus", folder)


@cache
def reported(task: Task, world_size: int) -> list[dict[tuple[int, int, int], TextScore]]:
    """What every rank of a world says."""
    return run_ranks("tests.training.test_held_out:score_on_grids", world_size, task)


def score_alone(task: Task, grid: tuple[int, int, int]) -> TextScore:
    """The same sequences by the model that was left, in one process, without pipeline, loader or HeldOut."""
    test = task.splits(task.config(grid)).test
    assert test is not None
    samples = [test[index] for index in range(NUM_BATCHES * GLOBAL_BATCH)]
    tokens = torch.stack([sample["tokens"] for sample in samples])
    labels = torch.stack([sample["labels"] for sample in samples])
    with single_process() as groups, torch.no_grad():
        logits = load_model(task.model_directory(grid), TensorParallel(groups.tensor))(tokens)
    vocabulary = task.config(grid).model.vocab_size
    nats = F.cross_entropy(logits[..., :vocabulary].double().flatten(0, 1), labels.flatten(), reduction="sum")
    tokenizer = byte_tokenizer()
    # Every token but the end of a document is one byte of the text.
    size = int((labels != tokenizer.end_of_document).sum())
    return TextScore(labels.numel(), float(nats), size)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_a_reported_score_is_that_of_the_model_left_behind(task: Task, grid: tuple[int, int, int]) -> None:
    scores = [rank[grid] for rank in reported(task, math.prod(grid))]
    alone = score_alone(task, grid)
    assert 0 < alone.bytes <= alone.tokens == NUM_BATCHES * GLOBAL_BATCH * 32
    for score in scores:
        assert (score.tokens, score.bytes) == (alone.tokens, alone.bytes)
        assert abs(score.nats / score.tokens - alone.nats / alone.tokens) <= 1e-4
        assert abs(score.bits_per_byte - alone.bits_per_byte) <= 1e-4
        assert math.isclose(score.perplexity, alone.perplexity, rel_tol=1e-3)
