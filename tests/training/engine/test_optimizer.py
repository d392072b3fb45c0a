"""Learning rates over a run, and what decays."""

import itertools

import pytest
import torch
from torch import nn

from stagdist.config.parts import OptimizerConfig, SchedulerConfig
from stagdist.training.engine.optimizer import build_optimizer, learning_rate

PEAK = OptimizerConfig(learning_rate=1.0)


def rates(steps: int = 100, **keys: object) -> list[float]:
    scheduler = SchedulerConfig(**keys)  # type: ignore[arg-type]
    return [learning_rate(step, steps=steps, optimizer=PEAK, scheduler=scheduler) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_the_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    values = rates(kind=kind, warmup_steps=10)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == pytest.approx(1.0) and min(values[10:]) >= 0.1


def test_cosine_and_linear_fall_to_the_minimum() -> None:
    cosine, linear = rates(kind="cosine"), rates(kind="linear")
    assert cosine[50] == pytest.approx(0.55) and linear[50] == pytest.approx(0.55)
    assert cosine[25] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5)) and linear[25] == pytest.approx(0.775)
    assert all(later < earlier for earlier, later in itertools.pairwise(cosine))
    short = rates(kind="linear", decay_steps=40)
    assert short[40:] == pytest.approx([0.1] * 60)


def test_constant_stays() -> None:
    assert rates(kind="constant") == [1.0] * 100


def test_warm_up_stable_decay_is_flat_until_its_tail() -> None:
    values = rates(kind="warmup_stable_decay", warmup_steps=10, decay_steps=20, minimum_ratio=0.0)
    assert values[9:81] == pytest.approx([1.0] * 72)
    assert values[90] == pytest.approx(0.5) and values[99] == pytest.approx(0.05)
    assert rates(kind="warmup_stable_decay")[89:91] == pytest.approx([1.0, 1.0])


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.ModuleDict({"matrix": nn.Linear(3, 4), "norm": nn.RMSNorm(4)})
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {"matrix.weight"}
