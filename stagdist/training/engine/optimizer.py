"""AdamW with separate groups for weight decay, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from stagdist.config.parts import OptimizerConfig, SchedulerConfig


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in which every matrix decays and no vector does.

    This is torch's fused AdamW, which needs no temporaries, also on CPUs. DeepSpeed's own optimizers are compiled on
    first use.
    """
    parameters = [parameter for _, parameter in named]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, *, steps: int, optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> float:
    """Learning rate of the update after `step` steps.

    The warm-up is linear and reaches the peak at its last step. After its end, every schedule stays at its minimum.
    Source for warm-up-stable-decay: MiniCPM (Hu et al. 2024).
    """
    peak, low = optimizer.learning_rate, optimizer.learning_rate * scheduler.minimum_ratio
    if step < scheduler.warmup_steps:
        return peak * (step + 1) / scheduler.warmup_steps
    if scheduler.kind == "constant":
        return peak
    if scheduler.kind == "warmup_stable_decay":
        tail = scheduler.decay_steps or max(1, steps // 10)
        start, end = steps - tail, steps
    else:
        start, end = scheduler.warmup_steps, scheduler.decay_steps or steps
    progress = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    if scheduler.kind == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (low - peak) * progress
