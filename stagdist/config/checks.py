"""Every reason why a configuration contradicts itself or does not fit a world size, told with the remedy.

The cross-checks of `stagdist/config.py`, which calls them; pure functions of the values, one list of problems each.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagdist.config.parts import DataConfig, ModelConfig
    from stagdist.config.run_config import RunConfig


def model_problems(model: ModelConfig) -> list[str]:
    """Every reason why the shape of a model contradicts itself."""
    problems = []
    heads = model.num_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        problems.append(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.num_attention_heads {heads}; "
            "change one of them or set model.head_dim"
        )
    elif model.hidden_size % heads and not model.staggered:
        problems.append(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.num_attention_heads {heads}; a "
            "sequential model is exported as a Llama, and transformers loads none without that, whatever "
            "model.head_dim is: change one of them"
        )
    if model.head_width % 2:
        problems.append(f"the head width {model.head_width} is odd, but rotary embeddings turn pairs")
    for key, value in (
        ("num_key_value_heads", model.key_value_heads),
        ("cross_attention_key_value_heads", model.cross_key_value_heads),
    ):
        if heads % value:
            problems.append(f"model.num_attention_heads {heads} is not a multiple of model.{key} {value}")
    if not model.staggered:
        problems += _staggered_only_problems(model)
    if model.share_section_weights and len(set(model.section_layers)) > 1:
        problems.append(
            f"model.share_section_weights needs equal sections, model.section_layers is {list(model.section_layers)}"
        )
    if model.cross_attention_window is not None and model.cross_attention_window > model.max_position_embeddings:
        problems.append(
            f"model.cross_attention_window {model.cross_attention_window} is longer than "
            f"model.max_position_embeddings {model.max_position_embeddings}; use null for no window"
        )
    return problems


def _staggered_only_problems(model: ModelConfig) -> list[str]:
    """A sequential model refuses the keys that only a StagFormer has, unless they hold their defaults."""
    keys = (
        "stagger",
        "cross_attention_window",
        "cross_attention_key_value_heads",
        "share_section_weights",
        "combine_sections",
    )
    return [
        f"model.{key} is {getattr(model, key)!r}, but only a staggered model has it; "
        f"remove it or set model.connection: staggered"
        for key in keys
        if getattr(model, key) != type(model).model_fields[key].default
    ]


def data_problems(data: DataConfig) -> list[str]:
    """Every reason why the choice of corpora contradicts itself."""
    problems = []
    separate = data.train_corpora or data.validation_corpora or data.test_corpora
    if data.corpora and separate:
        problems.append("data.corpora (cut by data.split) excludes data.train_corpora and its sisters; keep one way")
    elif separate and not data.train_corpora:
        problems.append("data.train_corpora is empty, but data.validation_corpora or data.test_corpora is not")
    if min(data.split) < 0 or data.split[0] <= 0:
        problems.append(f"data.split {list(data.split)} must not be negative and needs a share for training")
    return problems


def tensor_parallel_problems(model: ModelConfig, size: int, option: str) -> list[str]:
    """Every dimension of a model that `size` tensor-parallel ranks cannot share equally.

    Args:
        option: the key or flag that holds the size, for messages.
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


def run_problems(config: RunConfig) -> list[str]:
    """Every reason, independent of the world size, why a configuration would not run."""
    problems = []
    pipe, tensor = config.pipeline_parallel_size, config.parallel.tensor_parallel_size
    model, training = config.model, config.training
    if model.num_sections % pipe:
        problems.append(
            f"parallel.pipeline_parallel_size {pipe} does not divide the {model.num_sections} sections of "
            f"model.section_layers {list(model.section_layers)}"
        )
    problems += tensor_parallel_problems(model, tensor, "parallel.tensor_parallel_size")
    if config.sequence_length > model.max_position_embeddings:
        problems.append(
            f"data.sequence_length {config.sequence_length} is longer than "
            f"model.max_position_embeddings {model.max_position_embeddings}"
        )
    if training.global_batch_size % training.micro_batch_size:
        problems.append(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size {training.micro_batch_size}"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.parallel.device):
        problems.append(f"parallel.device is {config.parallel.device!r}; give auto, cpu, cuda or cuda:N")
    if training.precision == "fp16" and config.parallel.device == "cpu":
        problems.append("training.precision fp16 scales its loss on a GPU only, but parallel.device is cpu; use bf16")
    if training.steps * training.global_batch_size > config.num_samples:
        problems.append(
            f"data.num_samples {config.num_samples} is less than training.steps * training.global_batch_size = "
            f"{training.steps * training.global_batch_size}; raise it before the run starts, it is fixed afterwards"
        )
    return problems + _zero_problems(config) + _scheduler_problems(config)


_OFFLOADS = ("offload_optimizer", "offload_param", "cpu_offload")


def _zero_problems(config: RunConfig) -> list[str]:
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [f"deepspeed.zero_optimization must be a mapping, got {zero!r}"]
    owned = sorted({"contiguous_gradients", "overlap_comm", "elastic_checkpoint", *_OFFLOADS} & zero.keys())
    if owned:
        return [f"deepspeed.zero_optimization.{key} cannot be set: the pipeline engine fixes it" for key in owned]
    stage = zero.get("stage", 1)
    if stage == 1:
        return []
    reason = (
        "the pipeline accumulates whole gradients over its micro-batches, which ZeRO-2 and 3 shard away"
        if stage in (2, 3)
        else "without ZeRO-1 DeepSpeed clips fp32 pipelines by a wrong gradient norm"
    )
    return [f"deepspeed.zero_optimization.stage is {stage}, only 1 works: {reason}"]


def _scheduler_problems(config: RunConfig) -> list[str]:
    scheduler, steps = config.scheduler, config.training.steps
    if scheduler.kind == "warmup_stable_decay":
        tail = scheduler.decay_steps or max(1, steps // 10)
        if scheduler.warmup_steps + tail > steps:
            return [
                f"scheduler.warmup_steps {scheduler.warmup_steps} + scheduler.decay_steps {tail} exceed "
                f"training.steps {steps}"
            ]
    elif scheduler.warmup_steps > (scheduler.decay_steps or steps):
        return [f"scheduler.warmup_steps {scheduler.warmup_steps} is longer than the schedule"]
    return []


def world_problems(config: RunConfig, world_size: int) -> list[str]:
    """Every reason why a valid configuration would not run on `world_size` ranks."""
    pipe, tensor = config.pipeline_parallel_size, config.parallel.tensor_parallel_size
    if world_size < 1:
        return [f"world size {world_size} is no number of ranks; start {pipe * tensor} or a multiple of it"]
    if world_size % (pipe * tensor):
        return [
            f"world size {world_size} is not a multiple of pipeline {pipe} x tensor {tensor} = {pipe * tensor}; "
            f"start {pipe * tensor} or a multiple of it"
        ]
    data = world_size // (pipe * tensor)
    per_round = data * config.training.micro_batch_size
    if config.training.global_batch_size % per_round:
        return [
            f"training.global_batch_size {config.training.global_batch_size} is not a multiple of data-parallel size "
            f"{data} x training.micro_batch_size {config.training.micro_batch_size} = {per_round}"
        ]
    return []
