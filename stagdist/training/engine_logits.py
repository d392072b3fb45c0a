"""Logits of the trained model, computed through the pipeline on every rank's own weights."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagdist.parallel.groups import Groups
from stagdist.parallel.layout import padded_vocab_size
from stagdist.training.engine.distributed import bring_to_first
from stagdist.training.engine.pipeline import HeadLayer
from stagdist.training.engine.section_engine import SectionEngine


def engine_logits(engine: SectionEngine, groups: Groups, vocab_size: int, input_ids: Tensor) -> Tensor:
    """Logits of one text by the engine's forward pass, in its own precision; called on every rank.

    The text is put at the beginning of each sequence of one micro-batch. The padding comes after it, where a causal
    model cannot look.

    Args:
        input_ids: not longer than the run's sequences.

    Returns:
        On rank 0 fp32 logits on the CPU, of the valid vocabulary; an empty tensor elsewhere.

    Shapes: int64 [1, S] -> [1, S, V].
    """
    length, grid = input_ids.shape[1], groups.grid
    padded = torch.zeros(engine.exchange.hand_off.memory.shape[-3:-1], dtype=torch.int64, device=engine.device)
    padded[:, :length] = input_ids
    kept: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: object, logits: Tensor) -> None:
        kept.append(logits[:1, :length].to("cpu", torch.float32, copy=True))  # the loss overwrites them

    heads = [layer for layer in engine.module.modules() if isinstance(layer, HeadLayer)]
    hooks = [head.register_forward_hook(keep) for head in heads]
    try:
        engine.eval_batch(iter([(padded, padded)]), num_micro_batches=1)
    finally:
        for hook in hooks:
            hook.remove()
    shape = (1, length, padded_vocab_size(vocab_size, grid.tensor) // grid.tensor)
    slices = []
    for tensor_rank in range(grid.tensor):
        owner = grid.rank(grid.pipe - 1, 0, tensor_rank)
        mine = kept[0] if dist.get_rank() == owner else None
        slices.append(bring_to_first(groups.control, owner, mine, shape, torch.float32))
    if dist.get_rank() != 0:
        return torch.empty(0)
    return torch.cat(slices, dim=-1)[..., :vocab_size]
