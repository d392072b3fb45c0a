"""The same sections under `torch.distributed.pipelining`'s 1F1B schedule.

Its task is easier: every stage reads its tokens itself, so a hand-off carries the float memory alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.training.stage import StageModule
from stagdist.config.run_config import RunConfig
from stagdist.data.loader import MicroBatch
from stagdist.training.engine.optimizer import build_optimizer
from stagdist.training.engine.pipeline import mean_nats


class TorchPipelining:
    """One optimizer step at a time: 1F1B, sum of the tied gradient, clipping by the global norm, AdamW.

    Args:
        config: the run; one data-parallel replica on a pipe axis that spans the world.
        stage: this rank's stage.
        carried: shape of what one stage hands to the next.
        num_micro_batches: micro-batches of a step.
    """

    def __init__(self, config: RunConfig, stage: StageModule, carried: tuple[int, ...], num_micro_batches: int):
        self.stage, self._max_norm = stage, config.optimizer.max_grad_norm
        self._rank, self._last = dist.get_rank(), dist.get_world_size() - 1
        weight = stage.embedding.embedding.weight
        batch, length = config.training.micro_batch_size, config.sequence_length
        memory = torch.empty(carried, dtype=weight.dtype, device="meta", requires_grad=True)
        tokens = torch.empty(batch, length, dtype=torch.int64, device="meta")
        logits = torch.empty(batch, length, config.model.vocab_size, dtype=weight.dtype, device="meta")
        pipeline_stage = PipelineStage(
            stage,
            self._rank,
            self._last + 1,
            weight.device,
            input_args=(tokens if self._rank == 0 else memory,),
            output_args=(logits if self._rank == self._last else memory,),
        )
        self._schedule = Schedule1F1B(
            pipeline_stage,
            num_micro_batches,
            # Scaled here, so that the schedule need not touch every gradient again.
            loss_fn=lambda output, labels: mean_nats(output, labels, stage.parallel) / num_micro_batches,
            scale_grads=False,
        )
        self._optimizer = build_optimizer(stage.named_parameters(), config.optimizer)
        self.gradient_norm = 0.0

    def step(self, micro_batches: list[MicroBatch]) -> float:
        """Train one step; the loss (0 on all stages but the last)."""
        tokens = torch.cat([batch[0] for batch in micro_batches])
        losses: list[Tensor] = []
        if self._rank == 0:
            self._schedule.step(tokens, return_outputs=False)
        elif self._rank == self._last:
            labels = torch.cat([batch[1] for batch in micro_batches])
            self._schedule.step(tokens=tokens, target=labels, losses=losses, return_outputs=False)
        else:
            self._schedule.step(tokens=tokens, return_outputs=False)
        self._update()
        return float(torch.stack([loss.detach() for loss in losses]).sum()) if losses else 0.0

    def _update(self) -> None:
        shared = self.stage.embedding.embedding.weight
        dist.all_reduce(shared.grad)
        gradients = [parameter.grad for parameter in self.stage.parameters() if parameter.grad is not None]
        # The tied embedding is on every stage and counts once.
        counted = [gradient for gradient in gradients if gradient is not shared.grad or self._rank == 0]
        square = torch.stack(torch._foreach_norm(counted)).square().sum()
        dist.all_reduce(square)
        self.gradient_norm = float(square.sqrt())
        if self._max_norm and self.gradient_norm > self._max_norm:
            torch._foreach_mul_(gradients, self._max_norm / (self.gradient_norm + 1e-6))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
