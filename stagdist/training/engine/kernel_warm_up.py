"""Every kernel of a micro-batch, launched once before ranks wait for each other.

CUDA loads a kernel when it is launched for the first time, and waits for the device to drain before it does. A rank
that met a new kernel behind a receive would wait for its peer, and the peer for it.
"""

import torch
from torch import Tensor

from stagdist.config.run_config import RunConfig
from stagdist.training.engine.exchange import TensorKind, as_tuple
from stagdist.training.engine.pipeline import SectionPipeline


def dry_pass(
    module: SectionPipeline,
    config: RunConfig,
    kinds: list[TensorKind],
    device: torch.device | str,
    *,
    first_stage: bool,
    last_stage: bool,
) -> None:
    """Run this stage forward and backward on zeros. Gradients of parameters stay as they are.

    The ranks of a tensor group call this at the same time.

    Args:
        kinds: what a stage hands to the next.
    """
    tokens = torch.zeros(config.training.micro_batch_size, config.sequence_length, dtype=torch.int64, device=device)
    wanted: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    inputs: Tensor | tuple[Tensor, Tensor] = tokens
    if not first_stage:
        carried = torch.zeros(kinds[0].shape, dtype=kinds[0].dtype, device=device, requires_grad=True)
        wanted.append(carried)
        inputs = (carried, tokens) if len(kinds) > 1 else carried
    outputs = module(inputs)
    result = module.loss_fn(outputs, tokens) if last_stage else as_tuple(outputs)[0]
    # Not `backward`: its hooks would hand the gradients to the optimizer.
    torch.autograd.grad(result, wanted, torch.ones_like(result), allow_unused=True)
