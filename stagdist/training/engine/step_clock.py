"""Where the time of a step goes: the kinds of instructions, and the clock around them."""

import time
from dataclasses import dataclass

import torch
from deepspeed.runtime.pipe import schedule

from stagdist.telemetry.pulse import Phase

COMPUTE = (schedule.ForwardPass, schedule.BackwardPass)
UPDATE = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)

PHASES = {
    schedule.LoadMicroBatch: Phase.LOAD,
    schedule.ForwardPass: Phase.FORWARD,
    schedule.BackwardPass: Phase.BACKWARD,
    schedule.RecvActivation: Phase.RECEIVE,
    schedule.RecvGrad: Phase.RECEIVE,
    schedule.SendActivation: Phase.SEND,
    schedule.SendGrad: Phase.SEND,
} | dict.fromkeys(UPDATE, Phase.UPDATE)
"""The phase that a rank reports while it runs an instruction."""


@dataclass
class StepTimes:
    """Seconds that this rank spent in one training step.

    Attributes:
        compute_s: forward and backward passes.
        pipeline_s: from the first instruction to the last one before gradients are reduced.
        load_s: waiting for micro-batches.
        update_s: reduction of gradients, gate and optimizer.
    """

    compute_s: float = 0.0
    pipeline_s: float = 0.0
    load_s: float = 0.0
    update_s: float = 0.0


class ComputeClock:
    """Adds up the time spent inside `with clock:`; on CUDA by events, elsewhere by the host's clock."""

    def __init__(self, device: torch.device):
        self._on_cuda = torch.device(device).type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._total_s = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        if self._on_cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._begun = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._total_s += time.perf_counter() - self._begun
        if self._on_cuda:
            self._events[-1][1].record()

    def seconds(self) -> float:
        """Time inside the clock; the device must have passed its last event."""
        if self._on_cuda:
            return sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        return self._total_s
