"""Cross-entropy over a split vocabulary against torch's; with two tensor ranks the parity tests compare it."""

import pytest
import torch
from torch.nn import functional as F

from stagdist.model.cross_entropy import token_nats
from stagdist.model.megatron import TensorParallel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_equal_those_of_torch(dtype: torch.dtype, alone: TensorParallel) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (10 * torch.randn(2, 5, 37, generator=generator)).to(dtype)
    labels = torch.randint(37, (2, 5), generator=generator)
    weights = torch.rand(2, 5, generator=generator)
    logits, expected_logits = (values.clone().requires_grad_() for _ in range(2))
    nats = token_nats(logits * 1, labels, alone)  # fp32 logits are overwritten
    expected = F.cross_entropy(expected_logits.float().transpose(1, 2), labels, reduction="none")
    (nats * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(logits.grad, expected_logits.grad)
