"""DeepSpeed's configuration, derived from ours in this one place."""

from collections.abc import Mapping
from typing import Any

from stagdist.config.parts import OptimizerConfig, TrainingConfig
from stagdist.parallel.grid import Grid
from stagdist.planning.memory import REDUCE_BUCKET_ELEMENTS

NEVER = 2**31 - 1
"""Steps between two of DeepSpeed's own log lines. stagdist writes its own."""


def deepspeed_config(
    training: TrainingConfig, optimizer: OptimizerConfig, extra: Mapping[str, Any], grid: Grid
) -> dict[str, Any]:
    """The dictionary that DeepSpeed's engine is made from.

    ZeRO-1 always: it is the one stage whose gradient norm is right in a pipeline at every precision. Its bucket
    buffer is off: a pipeline reduces once per step, so the buffer would cost memory and save nothing.

    Args:
        extra: the `deepspeed` part of the configuration, passed through.
    """
    derived: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.num_micro_batches(grid.data),
        "gradient_clipping": optimizer.max_grad_norm,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        # It would make a GPU wait for the host at every forward pass; stagdist has its own meters.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "zero_optimization": {
            "stage": 1,
            "contiguous_gradients": False,
            "overlap_comm": False,
            "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        },
    }
    if training.precision == "bf16":
        derived["bf16"] = {"enabled": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        # DeepSpeed would round the accumulated gradients to bf16 on their way to the other replicas.
        derived["communication_data_type"] = "fp32"
    elif training.precision == "fp16":
        derived["fp16"] = {"enabled": True}
    extra = dict(extra)
    derived["zero_optimization"] |= extra.pop("zero_optimization", {})
    return derived | extra
