"""Checks between the parts of a configuration. Each function returns one message per problem, with the remedy."""

import re
from typing import Any

from stagdist.config.parts import ModelConfig, ParallelConfig, SchedulerConfig, TrainingConfig


def layout_problems(model: ModelConfig, pipe: int, tensor: int) -> list[str]:
    """Why a model cannot be divided among `pipe` stages and `tensor` tensor-parallel ranks."""
    problems = []
    if model.num_sections % pipe:
        problems.append(
            f"parallel.pipeline_parallel_size {pipe} does not divide the {model.num_sections} sections of "
            f"model.section_layers {list(model.section_layers)}"
        )
    return problems + tensor_parallel_problems(model, tensor, "parallel.tensor_parallel_size")


def tensor_parallel_problems(model: ModelConfig, size: int, option: str) -> list[str]:
    """Every dimension of a model that `size` tensor-parallel ranks cannot divide equally.

    Args:
        option: the configuration key or command-line option that holds the size.
    """
    dimensions = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "cross_attention_key_value_heads": model.cross_key_value_heads,
        "intermediate_size": model.intermediate_size,
    }
    return [
        f"model.{key} {value} is not a multiple of {option} {size}" for key, value in dimensions.items() if value % size
    ]


def training_problems(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, sequence_length: int
) -> list[str]:
    """Why a run cannot train with these batches, this precision and this data."""
    problems = []
    if sequence_length > model.max_position_embeddings:
        problems.append(
            f"data.sequence_length {sequence_length} is longer than "
            f"model.max_position_embeddings {model.max_position_embeddings}"
        )
    if training.global_batch_size % training.micro_batch_size:
        problems.append(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size {training.micro_batch_size}"
        )
    if problem := device_problem(parallel.device, "parallel.device"):
        problems.append(problem)
    if training.precision == "fp16" and parallel.device == "cpu":
        problems.append(
            "training.precision fp16 scales the loss, which works on a GPU only, but parallel.device is cpu; use bf16"
        )
    return problems


def device_problem(choice: str, option: str) -> str | None:
    """Why `choice` does not name a device; None if it does.

    Args:
        option: name of the option or configuration key.
    """
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", choice):
        return None
    return f"{option} is {choice!r}; give auto, cpu, cuda or cuda:N"


def zero_problems(deepspeed: dict[str, Any]) -> list[str]:
    """Settings of DeepSpeed's ZeRO and of its messages that do not work with the pipeline engine."""
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [f"deepspeed.zero_optimization must be a mapping, got {zero!r}"]
    fixed = {"contiguous_gradients", "overlap_comm", "elastic_checkpoint"}
    fixed |= {"offload_optimizer", "offload_param", "cpu_offload"}
    if found := sorted(fixed & zero.keys()):
        return [f"deepspeed.zero_optimization.{key} cannot be set: the pipeline engine fixes it" for key in found]
    size, sent = zero.get("reduce_bucket_size", 1), deepspeed.get("communication_data_type", "fp32")
    if type(size) not in (int, float) or size < 1 or size % 1:
        return [f"deepspeed.zero_optimization.reduce_bucket_size is {size!r}; give a number of elements"]
    if sent is not None and str(sent).lower() not in ("fp16", "bf16", "fp32"):
        return [f"deepspeed.communication_data_type is {sent!r}; give fp16, bf16 or fp32"]
    stage = zero.get("stage", 1)
    if stage == 1:
        return []
    reason = (
        "the pipeline accumulates complete gradients over its micro-batches, which ZeRO-2 and 3 shard"
        if stage in (2, 3)
        else "without ZeRO-1 DeepSpeed clips fp32 pipelines by a wrong gradient norm"
    )
    return [f"deepspeed.zero_optimization.stage is {stage}, only 1 works: {reason}"]


def scheduler_problems(scheduler: SchedulerConfig, steps: int) -> list[str]:
    """Why a learning-rate schedule does not fit into the steps of a run."""
    if scheduler.kind == "warmup_stable_decay":
        decay_steps = scheduler.decay_steps or max(1, steps // 10)
        if scheduler.warmup_steps + decay_steps > steps:
            return [
                f"scheduler.warmup_steps {scheduler.warmup_steps} + scheduler.decay_steps {decay_steps} exceed "
                f"training.steps {steps}"
            ]
    elif scheduler.warmup_steps > (scheduler.decay_steps or steps):
        return [f"scheduler.warmup_steps {scheduler.warmup_steps} is longer than the schedule"]
    return []
