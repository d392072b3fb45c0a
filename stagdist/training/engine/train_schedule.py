"""The order in which a stage works on its micro-batches, as DeepSpeed's instructions. Pure: no tensors, no ranks.

DeepSpeed's own schedules are made for transfers that block both sides: a stage keeps a result until the peer has
something to exchange. Ours send a result as soon as it exists (see `stagdist/training/engine/exchange.py`).
"""

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.schedule import PipeInstruction

from stagdist.parallel.layout import micro_batches_in_flight


class _StageSchedule(schedule.PipeSchedule):
    """The instructions with which one stage runs a micro-batch forward and backward."""

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

    In plain 1F1B every result is needed as soon as it is ready, so transfer time, and any delay of one stage, delays
    the entire pipeline. Here the next input has arrived before a stage needs it. This costs memory for activations:
    see `micro_batches_in_flight`.

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
    """Forward passes only."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Instructions of one evaluation, grouped by pass."""
        for micro_batch in range(self.micro_batches):
            yield self._forward(micro_batch)

    def num_pipe_buffers(self) -> int:
        """One: the exchange keeps what a stage sends until it is sent."""
        return 1
