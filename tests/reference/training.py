"""Training of the reference model: one process, the full global batch at once, AdamW written out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.stagformer import Parameters, forward, loss


@dataclass
class AdamW:
    """Adam with decoupled weight decay on matrices only. Source: Loshchilov and Hutter, ICLR 2019."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        self.steps = 0
        self.first: Parameters = {}
        self.second: Parameters = {}

    def update(self, parameters: Parameters, gradients: Parameters, learning_rate: float) -> Parameters:
        """Parameters after one step; the inputs are left as they are."""
        self.steps += 1
        beta1, beta2 = self.betas
        updated = {}
        for name, value in parameters.items():
            gradient = gradients[name]
            self.first[name] = beta1 * self.first.get(name, 0.0) + (1 - beta1) * gradient
            self.second[name] = beta2 * self.second.get(name, 0.0) + (1 - beta2) * gradient**2
            mean = self.first[name] / (1 - beta1**self.steps)
            deviation = (self.second[name] / (1 - beta2**self.steps)).sqrt()
            decay = self.weight_decay if value.ndim >= 2 else 0.0
            updated[name] = value - learning_rate * (mean / (deviation + self.eps) + decay * value)
        return updated


@dataclass
class TrainingRecord:
    """What happened: per step the loss and the gradient norm before clipping; gradients (before clipping) of the
    steps asked for; parameters and optimizer at the end."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[int, Parameters]
    parameters: Parameters
    optimizer: AdamW


def loss_and_gradients(
    parameters: Parameters, config: Any, input_ids: Tensor, labels: Tensor
) -> tuple[Tensor, Parameters]:
    """Mean loss of a global batch and its gradient for every parameter. Shapes: [N, S]."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    value = loss(forward(leaves, config, input_ids), labels)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def global_norm(gradients: Parameters) -> float:
    """Euclidean norm over all parameters together; a tied or shared one is a single entry and counts once."""
    return float(torch.stack([gradient.double().pow(2).sum() for gradient in gradients.values()]).sum().sqrt())


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Input tokens and labels of one global batch.

    A batch is either a pair (input_ids, labels), each [N, S], or one array of token ids [N, S + 1].
    """
    if isinstance(batch, tuple):
        return torch.as_tensor(batch[0]), torch.as_tensor(batch[1])
    tokens = torch.as_tensor(batch)
    return tokens[:, :-1], tokens[:, 1:]


def train(
    parameters: Parameters,
    config: Any,
    batches: Sequence[Any],
    learning_rates: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    gradients_of: Collection[int] = (0,),
    optimizer: AdamW | None = None,
) -> TrainingRecord:
    """Train on one global batch per step.

    learning_rates has one entry per step; max_grad_norm 0 switches clipping off; gradients_of names the steps
    (from 0) whose gradients are kept; optimizer continues an earlier run and then overrides betas, eps and decay.
    """
    optimizer = optimizer or AdamW(betas, eps, weight_decay)
    record = TrainingRecord([], [], {}, {name: value.detach() for name, value in parameters.items()}, optimizer)
    for step, (batch, learning_rate) in enumerate(zip(batches, learning_rates, strict=True)):
        value, gradients = loss_and_gradients(record.parameters, config, *split_batch(batch))
        norm = global_norm(gradients)
        record.losses.append(float(value))
        record.grad_norms.append(norm)
        if step in gradients_of:
            record.gradients[step] = gradients
        if max_grad_norm and norm > max_grad_norm:
            gradients = {name: gradient * (max_grad_norm / (norm + 1e-6)) for name, gradient in gradients.items()}
        record.parameters = optimizer.update(record.parameters, gradients, learning_rate)
    return record
