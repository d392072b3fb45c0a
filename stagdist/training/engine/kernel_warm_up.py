"""Every kernel of a micro-batch, launched once before ranks wait for each other.

CUDA loads a kernel when it is launched for the first time, and waits for the device to drain before it does. A rank
that met a new kernel behind a receive would wait for its peer, and the peer for it.
"""

import torch
from torch import Tensor

from stagdist.training.engine.pipeline import HandOff, SectionPipeline


def dry_pass(module: SectionPipeline, hand_off: HandOff, device: torch.device | str) -> None:
    """Run this stage forward and backward on zeros. Gradients of parameters stay as they are.

    The ranks of a tensor group call this at the same time.

    Args:
        hand_off: shapes of what a stage hands to the next.
    """
    input_ids = torch.zeros(hand_off.memory.shape[-3:-1], dtype=torch.int64, device=device)
    wanted: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    inputs: Tensor | tuple[Tensor, ...] = input_ids
    if module.stage_id > 0:
        memory = torch.zeros_like(hand_off.memory, device=device).requires_grad_()
        wanted.append(memory)
        inputs = HandOff(memory, None if hand_off.input_ids is None else input_ids).to_tuple()
    outputs = module(inputs)
    last = module.stage_id == module.num_stages - 1
    result = module.loss_fn(outputs, input_ids) if last else outputs[0]
    # Not `backward`: its hooks would hand the gradients to the optimizer.
    torch.autograd.grad(result, wanted, torch.ones_like(result), allow_unused=True)
