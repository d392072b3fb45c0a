"""The package's model in fp64: logits, loss and gradients in a plain loop, on one or on several tensor ranks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.model import megatron
from stagdist.model.megatron import TensorParallel, enter_tensor_parallel
from stagdist.model.stagformer import StagFormer
from stagdist.parallel.grid import Grid
from stagdist.parallel.groups import build_groups, set_default_timeout
from tests.ranks import GUARD_S
from tests.reference.sharding import cut
from tests.reference.stagformer import random_parameters

SEED = 3
BATCH = 2


@dataclass(frozen=True)
class Evaluation:
    """What one tensor rank computes: its slice of the logits, the loss, its part of every gradient."""

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def tokens(model: dict[str, Any], length: int) -> tuple[Tensor, Tensor]:
    """Input tokens and labels, each int64 [BATCH, length]; the last id of the vocabulary is among both."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(model["vocab_size"], (BATCH, length + 1), generator=generator)
    drawn[0, 0] = drawn[1, -1] = model["vocab_size"] - 1
    return drawn[:, :-1], drawn[:, 1:]


def loaded(model: dict[str, Any], parallel: TensorParallel) -> StagFormer:
    """The model with the reference's parameters."""
    stagformer = StagFormer(ModelConfig.model_validate(model), parallel)
    parameters = random_parameters(model, SEED, parallel.dtype, perturb=True)
    with torch.no_grad():
        for name, parameter in stagformer.canonical_parameters().items():
            parameter.copy_(cut(parameters, name, parallel.rank, parallel.size))
    return stagformer


def evaluate(model: dict[str, Any], parallel: TensorParallel, length: int) -> Evaluation:
    """Forward and backward once."""
    stagformer = loaded(model, parallel)
    input_ids, labels = tokens(model, length)
    logits = stagformer(input_ids)
    loss = vocabulary_loss(logits, labels, parallel)
    named = stagformer.canonical_parameters()
    gradients = torch.autograd.grad(loss, list(named.values()))
    return Evaluation(logits.detach(), float(loss.detach()), dict(zip(named, gradients, strict=True)))


def vocabulary_loss(logits: Tensor, labels: Tensor, parallel: TensorParallel) -> Tensor:
    """Mean cross-entropy over a vocabulary that is split over the ranks, in the dtype of the logits.

    Written out here because megatron-core's computes in fp32. Shapes: logits [B, S, V], labels [B, S].
    """
    highest = logits.detach().amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=parallel.group)
    total = _Sum.apply((logits - highest[..., None]).exp().sum(-1), parallel.group)
    local = labels - parallel.rank * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    chosen = logits.gather(-1, local.where(mine, 0)[..., None]).squeeze(-1)
    chosen = _Sum.apply(torch.where(mine, chosen, 0.0), parallel.group)
    return (total.log() + highest - chosen).mean()


class _Sum(torch.autograd.Function):
    """Sum over the ranks. Every rank continues with the same value, so the gradient stays as it is."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True)
class Entrance:
    """Gradients of a replicated tensor whose gradient, behind the entrance, is not contiguous.

    Attributes:
        expected: sum over the ranks.
        ours: through `enter_tensor_parallel`.
        plain: through megatron-core's function alone.
    """

    expected: Tensor
    ours: Tensor
    plain: Tensor


def _entrance(parallel: TensorParallel) -> Entrance:
    values = torch.arange(6.0).reshape(2, 3)
    factors = torch.arange(1.0, 7.0).reshape(3, 2)

    def gradient(entered: Any) -> Tensor:
        start = values.clone().requires_grad_()
        (entered(start).t() * factors * (parallel.rank + 1)).sum().backward()
        assert start.grad is not None
        return start.grad

    return Entrance(
        expected=factors.t() * sum(rank + 1 for rank in range(parallel.size)),
        ours=gradient(lambda start: enter_tensor_parallel(start, parallel)),
        plain=gradient(lambda start: megatron.copy_to_tensor_model_parallel_region(start, group=parallel.group)),
    )


def run(payload: tuple[dict[str, dict[str, Any]], int]) -> tuple[dict[str, Evaluation], Entrance]:
    """What one tensor rank does: every model once."""
    models, length = payload
    set_default_timeout(GUARD_S)
    dist.init_process_group("gloo")
    groups = build_groups(Grid(1, 1, dist.get_world_size()), GUARD_S)
    parallel = TensorParallel(groups.tensor, torch.float64)
    return {name: evaluate(model, parallel, length) for name, model in models.items()}, _entrance(parallel)
