"""The order in which a stage works on its micro-batches, as DeepSpeed's instructions. Pure: no tensors, no ranks.

DeepSpeed's own schedules are made for transfers that block both sides: a stage holds back results that are ready
until the peer has something to exchange. Ours let a result leave the moment it exists (see
`stagdist/training/engine/exchange.py` for transfers that nobody waits for).
"""

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.schedule import PipeInstruction

from stagdist.parallel.layout import micro_batches_in_flight


class _StageSchedule(schedule.PipeSchedule):
    """One stage's part: how a micro-batch passes forward and backward through it."""

    def _forward(self, micro_batch: int) -> list[PipeInstruction]:
        buffer = micro_batch % self.num_pipe_buffers()
        instructions: list[PipeInstruction] = []
        if not self.is_first_stage:
            instructions.append(schedule.RecvActivation(buffer))
        if self.is_first_stage or self.is_last_stage:
            instructions.append(schedule.LoadMicroBatch(buffer))
        instructions.append(schedule.ForwardPass(buffer))
        if not self.is_last_stage:
            instructions.append(schedule.SendActivation(buffer))
        return instructions

    def _backward(self, micro_batch: int) -> list[PipeInstruction]:
        buffer = micro_batch % self.num_pipe_buffers()
        instructions: list[PipeInstruction] = []
        if not self.is_last_stage:
            instructions.append(schedule.RecvGrad(buffer))
        instructions.append(schedule.BackwardPass(buffer))
        if not self.is_first_stage:
            instructions.append(schedule.SendGrad(buffer))
        return instructions


class TrainSchedule(_StageSchedule):
    """Eager 1F1B: earlier stages run further ahead than plain 1F1B needs.

    In plain 1F1B every result is needed the moment it is ready, so the time on the wire, and each moment in which
    one stage is slower than its neighbour, delays the whole pipeline. Here the next input lies ready when a stage
    turns to it. The price is activations: see `micro_batches_in_flight`.

    Source: Zhuang et al., On Optimizing the Communication of Model Parallelism (MLSys 2023), eager-1F1B.
    """

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Instructions of one optimizer step, grouped by pass."""
        ahead = micro_batches_in_flight(self.stages, self.stage_id, self.micro_batches)
        for micro_batch in range(ahead):
            yield self._forward(micro_batch)
        for micro_batch in range(self.micro_batches):
            yield self._backward(micro_batch)
            if micro_batch + ahead < self.micro_batches:
                yield self._forward(micro_batch + ahead)
        yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]

    def num_pipe_buffers(self) -> int:
        """Slots for the micro-batches in flight."""
        return micro_batches_in_flight(self.stages, self.stage_id, self.micro_batches)


class InferenceSchedule(_StageSchedule):
    """Forward passes alone."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Instructions of one evaluation, grouped by pass."""
        for micro_batch in range(self.micro_batches):
            yield self._forward(micro_batch)

    def num_pipe_buffers(self) -> int:
        """One: what a stage sends is kept by the exchange until it has left."""
        return 1
