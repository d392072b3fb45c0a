"""The training loop: one visible sequence of step, log, evaluate, save, stop."""

import logging
import signal
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.run_config import RunConfig
from stagdist.data.loader import Loader
from stagdist.errors import TrainingError
from stagdist.parallel.groups import Groups
from stagdist.telemetry.pulse import Phase
from stagdist.telemetry.spans import bubble_share
from stagdist.training.engine.agreement import Agreed, Agreement, Writing, shared
from stagdist.training.engine.optimizer import learning_rate
from stagdist.training.engine.section_engine import SectionEngine
from stagdist.training.held_out import HeldOut
from stagdist.training.lost_peers import naming_lost_peers
from stagdist.training.reporting import Reporter, StepRecord
from stagdist.training.saving.save import Saver

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a loop ended.

    Attributes:
        state: position of the run; saved.
        finished: all steps are done; otherwise the run was asked to stop.
        last_loss: of the last step, nats per token; None when no step was left to do.
    """

    state: TrainingState
    finished: bool
    last_loss: float | None


class Trainer:
    """Drives the engine from a state to the end of the run.

    Args:
        config: the run.
        groups: process groups of this rank.
        engine: model and optimizer, filled from the checkpoint where there is one.
        loader: micro-batches of this rank.
        validation: held-out sequences; None where the run has none.
        agreement: what ranks decide together.
        reporter: what people see; silent on ranks other than 0.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        engine: SectionEngine,
        loader: Loader,
        validation: HeldOut | None,
        agreement: Agreement,
        reporter: Reporter,
    ):
        self._config, self._groups, self._engine, self._loader = config, groups, engine, loader
        self._validation, self._agreement, self._reporter = validation, agreement, reporter
        self._agreed = Agreed((), 0, False, False)
        self._saver = Saver(engine, groups, config)
        engine.gate = self._gate

    def run(self, state: TrainingState) -> Outcome:
        """Train to the last step, or until the ranks agree to stop; the state is saved at either end.

        Raises:
            TrainingError: more steps than `training.max_bad_steps` were not finite; nothing is saved.
            CheckpointError: saving failed.
        """
        try:
            outcome = self._run(state)
        finally:
            self._saver.close()
        self._saver.release()
        return outcome

    def _run(self, state: TrainingState) -> Outcome:
        saved_step, loss = state.step, None
        self._reporter.start(state.step)
        self._engine.pulse.beat(Phase.STEP, state.step)
        while state.step < self._config.training.steps:
            loss = self._step(state)
            state = self._advance(state)
            self._engine.pulse.beat(Phase.STEP, state.step)
            if self._agreed.writing is not Writing.RUNNING:
                self._finish_save(state.step)
            self._check_bad_steps(state)
            # A stop has little time: the launcher kills after half a minute, so saving comes first.
            if self._due(state.step, self._config.evaluation.interval_steps) and not self._agreed.stop:
                self._evaluate(state.step)
            if self._due(state.step, self._config.checkpoint.interval_steps) or self._agreed.save_is_due:
                self._save(state)
                saved_step = state.step
            if self._agreed.stop:
                LOG.info("stopping after step %d: %s", state.step, _reason(self._agreed))
                break
        if saved_step != state.step:
            self._save(state)
        self._finish_save(state.step)
        return Outcome(state, state.step >= self._config.training.steps, loss)

    def _gate(self, finite: bool) -> bool:
        self._agreed = self._agreement.agree(finite, self._saver.vote())
        return not self._agreed.bad_ranks

    def _step(self, state: TrainingState) -> float:
        config = self._config
        rate = learning_rate(
            state.step, steps=config.training.steps, optimizer=config.optimizer, scheduler=config.scheduler
        )
        self._engine.set_learning_rate(rate)
        waited_s = self._loader.wait_s
        step = state.step + 1
        with self._peers(step):
            batches = self._engine.micro_batches_of_step(self._loader, state.consumed_samples)
            loss = self._engine.train_batch(batches)
        self._reporter.step_done(step)
        if self._due(step, config.logging.interval_steps) or step == config.training.steps:
            norm = None if self._agreed.bad_ranks else self._engine.gradient_norm()
            with self._peers(step):
                bubble = self._bubble()
            self._reporter.step(StepRecord(step, float(loss), rate, norm, bubble, self._loader.wait_s - waited_s))
        return float(loss)

    def _peers(self, step: int) -> AbstractContextManager[None]:
        return naming_lost_peers(self._groups, self._config.parallel.timeout_s, f"step {step}")

    def _bubble(self) -> float:
        """Share of the pipelined phase in which a stage does not compute, mean over the ranks."""
        mine = torch.tensor([self._engine.times.compute_s, self._engine.times.pipeline_s], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine, group=self._groups.control)
        return bubble_share([float(pair[0]) for pair in everyone], max(float(pair[1]) for pair in everyone))

    def _advance(self, state: TrainingState) -> TrainingState:
        grid = self._groups.grid
        return replace(
            state,
            step=state.step + 1,
            consumed_samples=state.consumed_samples + self._config.training.global_batch_size,
            grid=(grid.pipe, grid.data, grid.tensor),
            bad_steps=state.bad_steps + bool(self._agreed.bad_ranks),
        )

    def _check_bad_steps(self, state: TrainingState) -> None:
        if not self._agreed.bad_ranks:
            return
        ranks = ", ".join(map(str, self._agreed.bad_ranks))
        limit = self._config.training.max_bad_steps
        if state.bad_steps > limit:
            self._finish_save(state.step)  # it is of a step before this one
            raise shared(
                TrainingError(
                    f"step {state.step}: loss or gradients are not finite on rank {ranks}; {state.bad_steps} steps "
                    f"were, training.max_bad_steps is {limit}. Nothing was saved since the last checkpoint; lower "
                    "optimizer.learning_rate, or look at the samples of that step"
                )
            )
        LOG.log(
            logging.WARNING if dist.get_rank() == 0 else logging.INFO,
            "step %d is skipped on all ranks: loss or gradients are not finite on rank %s (%d so far, %d allowed)",
            state.step, ranks, state.bad_steps, limit,
        )  # fmt: skip

    def _evaluate(self, step: int) -> None:
        if self._validation is None:
            return
        with self._reporter.paused(), self._peers(step):
            self._reporter.held_out("validation", step, self._validation.score(self._engine))

    def _save(self, state: TrainingState) -> None:
        self._engine.pulse.beat(Phase.SAVE)
        with self._reporter.paused(), self._peers(state.step):
            self._reporter.flush()
            # At the end nothing runs beside the write, so there is no need for a copy.
            last = self._agreed.stop or state.step >= self._config.training.steps
            self._saver.save(state, wait=last)
        self._agreement.saved()

    def _finish_save(self, step: int) -> None:
        """Complete the save under way, if any; waits for its files where they are not written yet."""
        if self._saver.under_way:
            with self._reporter.paused(), self._peers(step):
                self._saver.finish()

    @staticmethod
    def _due(step: int, interval: int) -> bool:
        return interval > 0 and step % interval == 0


def _reason(agreed: Agreed) -> str:
    if agreed.signal_number:
        return f"{signal.Signals(agreed.signal_number).name} was received"
    return "training.max_minutes is reached"
