"""Cross-entropy over a vocabulary that is split over the tensor ranks.

megatron-core has the same function, but takes its group from global state that only `initialize_model_parallel` sets,
which makes 17 process groups.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from stagdist.model.megatron import TensorParallel


def token_nats(logits: Tensor, labels: Tensor, parallel: TensorParallel) -> Tensor:
    """Cross-entropy of every token, computed in fp32. Overwrites fp32 `logits`.

    Shapes: logits [B, S, V], labels int64 [B, S] -> fp32 [B, S], nats.
    """
    return _TokenNats.apply(logits.float().contiguous(), labels, parallel)


class _TokenNats(torch.autograd.Function):
    """Reuses the logits' memory for the softmax, and in the backward pass for the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, parallel: TensorParallel) -> Tensor:
        largest = logits.amax(-1)
        if parallel.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=parallel.group)
        logits -= largest[..., None]
        local = labels - parallel.rank * logits.shape[-1]
        mine = (local >= 0) & (local < logits.shape[-1])
        index = local.where(mine, 0)[..., None]
        chosen = logits.gather(-1, index).squeeze(-1).where(mine, 0.0)
        sums = torch.stack((chosen, logits.exp_().sum(-1)))
        if parallel.size > 1:
            dist.all_reduce(sums, group=parallel.group)
        chosen, total = sums
        logits /= total[..., None]
        ctx.save_for_backward(logits, index, mine)
        return total.log() - chosen

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        softmax, index, mine = ctx.saved_tensors  # type: ignore[attr-defined]
        softmax.scatter_add_(-1, index, -mine[..., None].to(softmax.dtype))
        return softmax.mul_(gradients[0][..., None]), None, None
