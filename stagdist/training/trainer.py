"""The training loop: step, log, evaluate, save, stop."""

import logging
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.parts import TrainingConfig
from stagdist.data.loader import Loader
from stagdist.errors import TrainingError
from stagdist.parallel.groups import Groups
from stagdist.telemetry.pulse import Phase
from stagdist.telemetry.spans import bubble_share
from stagdist.training.engine.agreement import Agreed, Agreement, Writing, shared
from stagdist.training.engine.audit import Audit
from stagdist.training.engine.section_engine import SectionEngine
from stagdist.training.held_out import HeldOut
from stagdist.training.reporting import Reporter
from stagdist.training.saving.save import Saver

LOG = logging.getLogger(__name__)

NamingPeers = Callable[[str], AbstractContextManager[None]]
"""(what the ranks do together) -> context that turns errors of the process groups into one that names the peer."""


@dataclass(frozen=True)
class TrainingOutcome:
    """How a training loop ended.

    Attributes:
        state: position of the run; saved.
        finished: all steps are done; otherwise the run was asked to stop.
        last_loss: of the last step, nats per token; None when no step was left to do.
    """

    state: TrainingState
    finished: bool
    last_loss: float | None


@dataclass
class Trainer:
    """Drives the engine from a state to the end of the run.

    Attributes:
        training: steps, batch and limit of bad steps.
        learning_rate: of the update after a number of steps.
        engine: model and optimizer, filled from the checkpoint if there is one.
        validation: held-out sequences; None if the run has none.
        audit: comparison of replicas.
        saver: of checkpoints; closed at the end of `run`.
        naming_peers: context of everything that needs other ranks.
    """

    training: TrainingConfig
    learning_rate: Callable[[int], float]
    groups: Groups
    engine: SectionEngine
    loader: Loader
    validation: HeldOut | None
    audit: Audit
    saver: Saver
    agreement: Agreement
    reporter: Reporter
    naming_peers: NamingPeers
    _agreed: Agreed = field(default=Agreed((), 0, False, False), init=False)

    def run(self, state: TrainingState) -> TrainingOutcome:
        """Train to the last step, or until the ranks agree to stop; the state is saved at either end.

        Raises:
            TrainingError: more steps than `training.max_bad_steps` were not finite, or replicas differ; nothing is
                saved.
            CheckpointError: saving failed.
        """
        try:
            outcome = self._run(state)
        finally:
            self.saver.close()
        self.saver.release()
        return outcome

    def _run(self, state: TrainingState) -> TrainingOutcome:
        saved_step, loss = state.step, None
        self.reporter.meter.start(state.step)
        self.engine.pulse.beat(Phase.STEP, state.step)
        while state.step < self.training.steps:
            loss = self._step(state)
            state = self._advance(state)
            self.engine.pulse.beat(Phase.STEP, state.step)
            if self._agreed.writing is not Writing.RUNNING:
                self._finish_save(state.step)
            self._check_bad_steps(state)
            if self.audit.due(state.step):
                self._compare_replicas(state.step)
            # A stop has little time: the launcher kills after half a minute, so saving comes first.
            if self.validation is not None and self.validation.due(state.step) and not self._agreed.stop:
                self._evaluate(self.validation, state.step)
            if self.saver.due(state.step) or self._agreed.save_is_due:
                self._save(state)
                saved_step = state.step
            if self._agreed.stop:
                LOG.info("stopping after step %d: %s", state.step, _reason(self._agreed))
                break
        if saved_step != state.step:
            self._save(state)
        self._finish_save(state.step)
        return TrainingOutcome(state, state.step >= self.training.steps, loss)

    def _gate(self, finite: bool) -> bool:
        self._agreed = self.agreement.agree(finite, self.saver.vote())
        return not self._agreed.bad_ranks

    def _step(self, state: TrainingState) -> float:
        rate, waited_s, step = self.learning_rate(state.step), self.loader.wait_s, state.step + 1
        self.engine.set_learning_rate(rate)
        with self._peers(step):
            batches = self.engine.micro_batches_of_step(self.loader, state.consumed_samples)
            watch = self.audit.watch_reduction if self.audit.due(step) else None
            loss = float(self.engine.train_batch(batches, self._gate, watch))
        self.reporter.meter.record(step)
        if self.reporter.due(step):
            with self._peers(step):
                bubble = self._bubble()
            self.reporter.step(
                step,
                {
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": None if self._agreed.bad_ranks else self.engine.gradient_norm(),
                    "pipeline_bubble": bubble,
                    "data_wait_s": self.loader.wait_s - waited_s,
                },
            )
        return loss

    def _peers(self, step: int) -> AbstractContextManager[None]:
        return self.naming_peers(f"step {step}")

    def _bubble(self) -> float:
        """Share of the pipelined phase in which a stage does not compute, mean over the ranks."""
        mine = torch.tensor([self.engine.times.compute_s, self.engine.times.pipeline_s], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine, group=self.groups.control)
        return bubble_share([float(pair[0]) for pair in everyone], max(float(pair[1]) for pair in everyone))

    def _advance(self, state: TrainingState) -> TrainingState:
        grid = self.groups.grid
        return replace(
            state,
            step=state.step + 1,
            consumed_samples=state.consumed_samples + self.training.global_batch_size,
            grid=(grid.pipe, grid.data, grid.tensor),
            bad_steps=state.bad_steps + bool(self._agreed.bad_ranks),
        )

    def _check_bad_steps(self, state: TrainingState) -> None:
        if not self._agreed.bad_ranks:
            return
        ranks = ", ".join(map(str, self._agreed.bad_ranks))
        limit = self.training.max_bad_steps
        if state.bad_steps > limit:
            self._finish_save(state.step)  # it is of a step before this one
            raise shared(
                TrainingError(
                    f"step {state.step}: loss or gradients are not finite on rank {ranks}; {state.bad_steps} steps "
                    f"were not finite so far, training.max_bad_steps is {limit}. Nothing was saved since the last "
                    "checkpoint; lower optimizer.learning_rate, or look at the samples of that step"
                )
            )
        LOG.log(
            logging.WARNING if dist.get_rank() == 0 else logging.INFO,
            "step %d is skipped on all ranks: loss or gradients are not finite on rank %s (%d so far, %d allowed)",
            state.step, ranks, state.bad_steps, limit,
        )  # fmt: skip

    def _compare_replicas(self, step: int) -> None:
        try:
            with self._peers(step):
                self.audit.compare(step)
        except TrainingError:
            self._finish_save(step)  # it is of a step before this one
            raise

    def _evaluate(self, validation: HeldOut, step: int) -> None:
        with self.reporter.meter.paused(), self._peers(step):
            self.reporter.held_out("validation", step, validation.score(self.engine))

    def _save(self, state: TrainingState) -> None:
        self.engine.pulse.beat(Phase.SAVE)
        with self.reporter.meter.paused(), self._peers(state.step):
            self.reporter.flush()
            # No step follows the last save, so copying to host memory would save no time.
            last = self._agreed.stop or state.step >= self.training.steps
            self.saver.save(state, wait=last)
        self.agreement.saved()

    def _finish_save(self, step: int) -> None:
        """Complete the save under way, if any; waits for its files where they are not written yet."""
        if self.saver.under_way:
            with self.reporter.meter.paused(), self._peers(step):
                self.saver.finish()


def _reason(agreed: Agreed) -> str:
    if agreed.signal_number:
        return f"{signal.Signals(agreed.signal_number).name} was received"
    return "training.max_minutes is reached"
