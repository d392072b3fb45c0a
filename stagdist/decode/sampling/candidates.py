"""Tensors of scores and token ids that a choice is made from: messages between ranks, the best of a row, truncation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.decode.sampling.noise import gumbel
from stagdist.decode.sampling.sampling_plan import SamplingPlan

MINUS_INF = float("-inf")


def message(columns: Sequence[tuple[Tensor, int, float]]) -> Tensor:
    """Columns side by side in float64, each (values [B, n], width, filler where n is smaller)."""
    return torch.cat([_filled(values.double(), width, fill) for values, width, fill in columns], dim=1)


def _filled(values: Tensor, width: int, fill: float) -> Tensor:
    missing = width - values.shape[1]
    return F.pad(values, (0, missing), value=fill) if missing else values


def merged(pieces: Tensor) -> Tensor:
    """[R, B, C] to [B, R * C], the slices by rank."""
    return pieces.transpose(0, 1).flatten(1)


def best_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best scores of each row, the lowest index first among equals, in the order of the index: [B, count].

    `topk` alone takes any of the equals at the edge. Fewer where a row has fewer.
    """
    size = scores.shape[1]
    if count >= size:
        return scores, torch.arange(size, device=scores.device).expand_as(scores)
    if count == 1:
        return scores.max(-1, keepdim=True)
    edge = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > edge, scores == edge
    room = count - above.sum(-1, keepdim=True)
    kept = above | (level & (level.cumsum(-1) <= room))
    # The kept ones are counted to their columns; all others go to an extra column, which is cut off.
    column = torch.where(kept, kept.cumsum(-1) - 1, count)
    index = torch.zeros(scores.shape[0], count + 1, dtype=torch.int64, device=scores.device)
    index.scatter_(1, column, torch.arange(size, device=scores.device).expand_as(column))
    index = index[:, :count]
    return scores.gather(1, index), index


def truncated(scores: Tensor, ids: Tensor, plan: SamplingPlan, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with noise of what top-k, top-p and min-p leave, minus infinity for the rest; rows without pass through.

    Shapes: all [B, R * C]; ids ascending among equal scores.
    """
    assert plan.truncated is not None
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    rank = torch.arange(scores.shape[1], device=scores.device)
    share = torch.where(rank < plan.top_k, (scores - scores[:, :1]).exp(), 0.0)
    # One running sum serves as mass and as total, so that padding at the end cannot change what is kept.
    mass = share.cumsum(-1)
    before = F.pad(mass[:, :-1], (1, 0))
    kept = (rank < plan.top_k) & (before < plan.top_p * mass[:, -1:]) & (share >= plan.min_p)
    noisy = torch.where(kept, scores + gumbel(plan.seeds, positions, ids), MINUS_INF)
    return torch.where(plan.truncated, noisy, scores), ids


def margins_of(scores: Tensor) -> Tensor:
    """Best minus second best of each row."""
    if scores.shape[1] < 2:
        return torch.full(scores.shape[:1], float("inf"), dtype=scores.dtype, device=scores.device)
    best = scores.topk(2).values
    return best[:, 0] - best[:, 1]
