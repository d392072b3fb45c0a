"""Bytes that one rank of a stage holds during training, estimated for DeepSpeed's engine. Pure, no torch.

The peak is reached at one of three moments: in a backward pass (with the activations of every micro-batch in flight),
in the reduction of the gradients, or in the step of the optimizer. Weights, gradients and optimizer state are held at
all three. The terms follow the implementation of DeepSpeed 0.19 (`zero/stage_1_and_2.py`, `bf16_optimizer.py`,
`pipe/engine.py`). Memory of the allocator, the process groups and the frameworks is not counted.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from stagdist.config.run_config import RunConfig
from stagdist.parallel.grid import Grid
from stagdist.parallel.layout import micro_batches_in_flight, stage_layout, stage_parameters
from stagdist.planning.activations import FP32, BackwardMoment, StageActivations

Device = Literal["cpu", "cuda"]

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
REDUCE_BUCKET_ELEMENTS = 50_000_000
"""Gradients that are reduced together, unless `deepspeed.zero_optimization.reduce_bucket_size` is set.

DeepSpeed's default of 5e8 would copy all gradients of most stages at once.
"""
FP64 = 8
"""DeepSpeed's ZeRO computes the norm of a gradient from a copy in double precision."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage; the total is the peak.

    Attributes:
        weights: weights in the precision of the forward pass.
        gradients: accumulated gradients, in all their copies.
        optimizer: this replica's share of the fp32 weights and of the two moments.
        tables: rotary tables.
        activations: held by autograd and the pipeline for micro-batches in flight, at the moment of most memory.
        backward_buffers: temporary tensors of a backward pass at that moment, minus gradients that do not exist yet.
        reduction_buffers: temporary tensors of the reduction of the gradients.
        step_buffers: temporary tensors of the step of the optimizer.
    """

    weights: int
    gradients: int
    optimizer: int
    tables: int
    activations: int
    backward_buffers: int
    reduction_buffers: int
    step_buffers: int

    @property
    def held(self) -> int:
        """Bytes held from the first step to the last."""
        return self.weights + self.gradients + self.optimizer + self.tables

    @property
    def moments(self) -> dict[str, int]:
        """Bytes at each of the moments at which the peak can be."""
        return {
            "backward pass": self.held + self.activations + self.backward_buffers,
            "gradient reduction": self.held + self.reduction_buffers,
            "optimizer step": self.held + self.step_buffers,
        }

    @property
    def peak_moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.moments[self.peak_moment]


def stage_memory(config: RunConfig, grid: Grid, stage: int, device: Device) -> StageMemory:
    """Bytes on one rank of `stage`, for a grid that fits the configuration."""
    training, element = config.training, ELEMENT_BYTES[config.training.precision]
    sizes = [prod(spec.local_shape(grid.tensor)) for spec in stage_parameters(config.model, grid.pipe, stage)]
    if training.precision == "bf16":
        states = _bf16_states(config, sizes, grid.data)
    else:
        states = _zero_states(config, sizes, grid.data, element)
    activations = StageActivations(
        config.model,
        stage_layout(config.model, grid.pipe, stage),
        sequences=training.micro_batch_size,
        length=config.sequence_length,
        element=element,
        tensor=grid.tensor,
        fused_norm=device == "cuda",
        checkpoint_layers=training.activation_checkpointing == "layer",
    )
    micro_batches = training.num_micro_batches(grid.data)
    in_flight = micro_batches_in_flight(grid.pipe, stage, micro_batches)
    moment = _busiest_pass(activations, micro_batches, in_flight, element * sum(sizes))
    return StageMemory(
        **states,
        tables=_rotary_tables(config, grid.pipe),
        activations=moment.activations,
        backward_buffers=moment.buffers,
    )


def _busiest_pass(activations: StageActivations, micro_batches: int, in_flight: int, gradients: int) -> BackwardMoment:
    """The moment of most memory in the backward passes of a step; the first pass begins without gradients."""
    if micro_batches > in_flight:
        return activations.busiest_moment(in_flight)
    # No later pass has as many micro-batches in flight as the first.
    passes = [activations.busiest_moment(in_flight, new_gradients=gradients)]
    if in_flight > 1:
        passes.append(activations.busiest_moment(in_flight - 1))
    return max(passes, key=lambda moment: moment.total)


def _zero_states(config: RunConfig, sizes: list[int], replicas: int, element: int) -> dict[str, int]:
    """DeepSpeedZeroOptimizer at stage 1: gradients in the precision of the weights, complete on every replica.

    Returns:
        The part of `StageMemory` that depends on the optimizer.
    """
    total, share = sum(sizes), -(-sum(sizes) // replicas)
    zero: Any = config.deepspeed.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)
    return {
        "weights": element * total,
        "gradients": element * total,
        "optimizer": 3 * FP32 * share,
        "reduction_buffers": element * copied_elements(sizes, int(bucket)),
        # The share of the gradients is flattened before the gradients are freed.
        "step_buffers": max(FP64 * max(sizes), element * share + (FP32 * share if element < FP32 else 0)),
    }


def copied_elements(sizes: list[int], bucket: int) -> int:
    """Elements of the largest bucket that is copied for its reduction. A bucket of one gradient is reduced in place.

    Args:
        sizes: elements of the gradients, in the order in which they are reduced.
        bucket: maximum elements of a bucket. A gradient that exceeds it begins a new bucket; gradients are never split.
    """
    largest = elements = members = 0
    for size in sizes:
        if elements + size > bucket:
            elements = members = 0
        elements, members = elements + size, members + 1
        if members > 1:
            largest = max(largest, elements)
    return largest


def _bf16_states(config: RunConfig, sizes: list[int], replicas: int) -> dict[str, int]:
    """BF16_Optimizer: bf16 gradients of one backward pass are added to fp32 gradients, which are kept."""
    total, share = sum(sizes), -(-sum(sizes) // replicas)
    # The flat fp32 gradients are reduced in place, unless the user configures a narrower communication dtype.
    sent = 0 if config.deepspeed.get("communication_data_type", "fp32") == "fp32" else 2 * max(sizes)
    return {
        "weights": 2 * total,
        "gradients": 2 * total + FP32 * total,
        "optimizer": 3 * FP32 * share,
        "reduction_buffers": sent,
        "step_buffers": FP32 * max(sizes),
    }


def _rotary_tables(config: RunConfig, pipe_size: int) -> int:
    """Cosines and sines in fp32, one table for each section of a stage."""
    model = config.model
    return model.num_sections // pipe_size * 2 * model.max_position_embeddings * model.head_width * FP32
