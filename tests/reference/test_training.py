"""Training with the reference, compared with torch's optimizer and gradient clipping."""

import math

import pytest
import torch

from tests.reference.small_models import BASE, perturbed, tokens
from tests.reference.stagformer import forward, loss
from tests.reference.training import AdamW, global_norm, loss_and_gradients, train


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3])
def test_training_equals_torch_adamw_with_torch_clipping(max_grad_norm: float) -> None:
    config = BASE | {"tie_word_embeddings": True}
    start = perturbed(config)
    batches = [tokens(2, 8, seed) for seed in range(6)]
    rates = [1e-2 / (step + 1) for step in range(6)]
    record = train(
        start, config, batches, rates, betas=(0.8, 0.9), weight_decay=0.3, max_grad_norm=max_grad_norm, gradients_of=[0]
    )

    leaves = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    matrices = [value for value in leaves.values() if value.ndim >= 2]
    vectors = [value for value in leaves.values() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-8)
    norms = []
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss(forward(dict(leaves), config, batch[:, :-1]), batch[:, 1:]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves.values(), max_grad_norm or math.inf)))
        optimizer.step()

    assert record.grad_norms == pytest.approx(norms, rel=1e-12)
    assert min(norms) > 0.3  # clipping happened
    for name, value in leaves.items():
        torch.testing.assert_close(record.parameters[name], value.detach(), rtol=1e-10, atol=1e-12, msg=name)
        assert torch.equal(start[name], perturbed(config)[name])  # the caller's tensors are not changed


def test_a_continued_optimizer_equals_an_uninterrupted_run() -> None:
    batches, rates = [tokens(2, 8, seed) for seed in range(4)], [1e-2] * 4
    complete = train(perturbed(BASE), BASE, batches, rates)
    half = train(perturbed(BASE), BASE, batches[:2], rates[:2])
    rest = train(half.parameters, BASE, batches[2:], rates[2:], optimizer=half.optimizer)
    assert half.losses + rest.losses == complete.losses
    assert all(torch.equal(rest.parameters[name], value) for name, value in complete.parameters.items())


def test_a_tied_matrix_gets_the_sum_of_both_gradients_and_counts_once_in_the_norm() -> None:
    tied = BASE | {"tie_word_embeddings": True}
    parameters = perturbed(tied)
    untied = parameters | {"head.weight": parameters["embedding.weight"].clone()}
    batch = tokens(2, 9), tokens(2, 9, seed=2)
    _, together = loss_and_gradients(parameters, tied, *batch)
    _, apart = loss_and_gradients(untied, BASE, *batch)
    head = apart.pop("head.weight")
    torch.testing.assert_close(together["embedding.weight"], apart["embedding.weight"] + head)
    apart["embedding.weight"] += head
    assert global_norm(together) == pytest.approx(global_norm(apart), rel=1e-12)


def test_vectors_do_not_decay() -> None:
    parameters = {"matrix": torch.ones(2, 2), "vector": torch.ones(2)}
    gradients = {name: torch.zeros_like(value) for name, value in parameters.items()}
    updated = AdamW(weight_decay=0.5).update(parameters, gradients, learning_rate=0.1)
    assert torch.equal(updated["vector"], torch.ones(2))
    torch.testing.assert_close(updated["matrix"], torch.full((2, 2), 0.95))
