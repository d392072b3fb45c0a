"""One pretraining run from a checked configuration to the model directory."""

import json
import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from stagdist.checkpoint.training.directory import TrainingState, checkpoint_name
from stagdist.config.run_config import RunConfig
from stagdist.data.compatibility import check_data, documents_begin, training_identity
from stagdist.data.corpus import Splits, build_splits
from stagdist.data.loader import BatchPlan, Loader
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import ConfigError
from stagdist.files import writing
from stagdist.parallel.device import on_cuda
from stagdist.parallel.grid import Grid
from stagdist.parallel.groups import Groups
from stagdist.telemetry.metrics import last_values
from stagdist.telemetry.plot import plot_loss
from stagdist.telemetry.pulse import Pulse
from stagdist.training.engine.agreement import Agreement, StopSignals, shared
from stagdist.training.engine.audit import Audit
from stagdist.training.engine.distributed import start_distributed, stop_distributed
from stagdist.training.engine.optimizer import learning_rate
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.held_out import HeldOut
from stagdist.training.lost_peers import naming_lost_peers
from stagdist.training.publish import publish_model
from stagdist.training.reporting import Reporter
from stagdist.training.saving.resume import load_checkpoint, newest_complete
from stagdist.training.saving.resumed_config import begun, resumed_config
from stagdist.training.saving.save import Saver
from stagdist.training.trainer import Trainer, TrainingOutcome

LOG = logging.getLogger(__name__)


def check_before_start(config: RunConfig, device: str) -> None:
    """Refuse a wrong configuration or data before any process group exists.

    Raises:
        ConfigError, DataError: with the remedy.
    """
    if config.training.precision == "fp16" and not on_cuda(device):
        raise ConfigError(f"training.precision fp16 needs a GPU, and this run is on {device}; use bf16 or fp32")
    check_data(
        config.data,
        sequence_length=config.sequence_length,
        vocab_size=config.model.vocab_size,
        num_samples=split_sizes(config),
    )


def split_sizes(config: RunConfig) -> tuple[int, int, int]:
    """Numbers of sequences of the train, validation and test splits."""
    held_out = config.evaluation.num_batches * config.training.global_batch_size
    data = config.data
    has_validation = config.evaluation.interval_steps > 0 and (
        data.split[1] > 0 if data.corpora else data.validation_corpora
    )
    has_test = data.split[2] > 0 if data.corpora else data.test_corpora
    return config.num_samples, held_out if has_validation else 0, held_out if has_test else 0


def pretrain(config: RunConfig, grid: Grid, device: str, started_at: float, pulse: Pulse) -> TrainingOutcome:
    """Train, evaluate, export. Called on every rank with the same configuration.

    Args:
        started_at: `time.monotonic` when the process began, for the wall-clock limit.
        pulse: signs of life for a supervisor.
    """
    signals = StopSignals()
    groups = start_distributed(grid, device, config.parallel.timeout_s, deterministic=config.training.deterministic)
    tokenizer = load_tokenizer(config.data.tokenizer)
    begins = documents_begin(config.data, tokenizer)
    if not begins:  # the published model is prompted and scored as it was trained
        tokenizer = tokenizer.without_begin()
    identity = training_identity(config.data, tokenizer)
    checkpoint = _checkpoint_to_resume(config, groups)
    if checkpoint is not None:
        config = resumed_config(config, checkpoint, identity, tokenizer.fingerprint)
    length, vocab_size = config.sequence_length, config.model.vocab_size
    with naming_lost_peers(groups, config.parallel.timeout_s, "waiting for the index maps of rank 0"):
        splits = build_splits(
            config.data,
            sequence_length=length,
            num_samples=split_sizes(config),
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            read_samples=config.training.steps * config.training.global_batch_size,
        )
    engine = build_engine(config, groups, pulse)
    sizes, fingerprint = (grid.pipe, grid.data, grid.tensor), tokenizer.fingerprint
    state = TrainingState(0, 0, config.num_samples, sizes, data_identity=identity, tokenizer=fingerprint)
    if checkpoint is not None:
        with naming_lost_peers(groups, config.parallel.timeout_s, "resuming"):
            loaded = load_checkpoint(engine, groups, config.model, checkpoint)
        state = begun(loaded, config, identity, fingerprint)
        LOG.info("resumed from %s after %.1f s", checkpoint, time.monotonic() - started_at)
    state = replace(state, documents_begin=begins)
    resumed_step = None if checkpoint is None else state.step
    reporter = Reporter(config, grid, rank=dist.get_rank(), device=device, resumed_step=resumed_step)
    run = _Run(config, groups, engine, tokenizer, splits, reporter)
    try:
        outcome = run.train(Agreement(groups.control, signals, config.training, config.checkpoint, started_at), state)
        if outcome.finished:
            run.finish(outcome, started_at)
    finally:
        reporter.close()
        signals.restore()
    dist.barrier(group=groups.control)
    engine.exchange.close()
    stop_distributed()
    return outcome


def _checkpoint_to_resume(config: RunConfig, groups: Groups) -> Path | None:
    with naming_lost_peers(groups, config.parallel.timeout_s, "looking for a checkpoint"):
        checkpoint = newest_complete(Path(config.folder) / "checkpoints", groups)
    if checkpoint is not None and config.checkpoint.resume == "never":
        problem = f"{checkpoint} exists and checkpoint.resume is never; choose another name for the run"
        raise shared(ConfigError(problem))
    return checkpoint


@dataclass(frozen=True)
class _Run:
    """The parts of a run: builds the trainer from them, and writes the results."""

    config: RunConfig
    groups: Groups
    engine: SectionEngine
    tokenizer: Tokenizer
    splits: Splits
    reporter: Reporter

    @property
    def _plan(self) -> BatchPlan:
        training, place = self.config.training, self.groups.place
        return BatchPlan(training.global_batch_size, training.micro_batch_size, place.data, self.groups.grid.data)

    def _held_out(self, dataset: Any) -> HeldOut | None:
        if dataset is None:
            return None
        rows = self.config.model.vocab_size  # a corpus of another program may use all of them
        known = self.tokenizer.token_bytes()[:rows]
        return HeldOut(dataset, self._plan, self.config.evaluation, np.pad(known, (0, rows - len(known))))

    def train(self, agreement: Agreement, state: TrainingState) -> TrainingOutcome:
        """Run the loop."""
        config, pin_memory = self.config, on_cuda(self.engine.device)
        loader = Loader(self.splits.train, self._plan, pin_memory=pin_memory, vocab_size=config.model.vocab_size)
        rate = partial(
            learning_rate, steps=config.training.steps, optimizer=config.optimizer, scheduler=config.scheduler
        )
        try:
            return Trainer(
                config.training,
                rate,
                self.groups,
                self.engine,
                loader,
                validation=self._held_out(self.splits.validation),
                audit=Audit(self.engine, self.groups, config.model, config.training.audit_steps),
                saver=Saver(self.engine, self.groups, config),
                agreement=agreement,
                reporter=self.reporter,
                naming_peers=partial(naming_lost_peers, self.groups, config.parallel.timeout_s),
            ).run(state)
        finally:
            loader.close()

    def finish(self, outcome: TrainingOutcome, started_at: float) -> None:
        """Test split, model directory, loss curve and summary."""
        config, folder = self.config, Path(self.config.folder)
        with naming_lost_peers(self.groups, config.parallel.timeout_s, "end of the run"):
            test = self._held_out(self.splits.test)
            if test is not None:
                self.reporter.held_out("test", outcome.state.step, test.score(self.engine))
            last = folder / "checkpoints" / checkpoint_name(outcome.state.step)
            publish_model(self.engine, self.groups, config.model, last, self.tokenizer, folder / "model")
        if dist.get_rank() == 0:
            self.reporter.flush()
            plot_loss(folder / "metrics.jsonl", folder / "loss.png", config.name)
            with writing(folder / "summary.json") as stream:
                stream.write(json.dumps(self._summary(outcome, started_at), indent=2) + "\n")
            LOG.info("wrote %s", folder / "model")

    def _summary(self, outcome: TrainingOutcome, started_at: float) -> dict[str, Any]:
        tokens = outcome.state.consumed_samples * self.config.sequence_length
        summary: dict[str, Any] = {
            "steps": outcome.state.step,
            "tokens": tokens,
            "grid": {"pipe": self.groups.grid.pipe, "data": self.groups.grid.data, "tensor": self.groups.grid.tensor},
            "bad_steps": outcome.state.bad_steps,
            "training_wall_s": time.monotonic() - started_at,
        }
        if outcome.last_loss is not None:
            summary |= {"train_loss": outcome.last_loss, "tokens_per_s": self.reporter.meter.average_tokens_per_s()}
        else:  # the last step was done before this start
            last = last_values(Path(self.config.folder), "train")
            summary |= {"train_loss": last.get("loss"), "tokens_per_s": last.get("tokens_per_s")}
        for split, score in self.reporter.heldout.items():
            summary[split] = score.as_metrics()
        return summary
