"""The model in fp64 equals the reference in logits, loss and every gradient; initial values follow the rule."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.model.megatron import TensorParallel
from stagdist.model.stagformer import StagFormer, fill_parameters
from stagdist.parallel.layout import model_parameters
from tests.model.double_precision import SEED, Entrance, Evaluation, evaluate, run, tokens
from tests.ranks import run_ranks
from tests.reference.sharding import join, join_mix
from tests.reference.stagformer import forward, initial_deviation, loss, parameter_shapes, random_parameters
from tests.reference.variants import BASE, VARIANTS

MODELS = {"default": BASE} | {name: BASE | keys for name, keys in VARIANTS.items()}
LENGTH = 12
TOLERANCE = 1e-10
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[dict[str, Evaluation], Entrance]]:
    """All models on two tensor ranks, in one launch."""
    return run_ranks(f"{run.__module__}:run", 2, (MODELS, LENGTH))


def assert_equals_reference(model: dict[str, Any], ranks: list[Evaluation], length: int = LENGTH) -> None:
    """Logits, loss and all gradients, put together from the ranks, are the reference's."""
    parameters = random_parameters(model, SEED, torch.float64, perturb=True)
    leaves = {name: value.requires_grad_() for name, value in parameters.items()}
    input_ids, labels = tokens(model, length)
    logits = forward(leaves, model, input_ids)
    expected_loss = loss(logits, labels)
    expected = dict(zip(leaves, torch.autograd.grad(expected_loss, list(leaves.values())), strict=True))

    found_logits = torch.cat([rank.logits for rank in ranks], dim=-1)
    vocabulary = model["vocab_size"]
    assert torch.isneginf(found_logits[..., vocabulary:]).all()
    torch.testing.assert_close(found_logits[..., :vocabulary], logits.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    for rank in ranks:
        assert abs(rank.loss - float(expected_loss.detach())) < TOLERANCE
    names = ranks[0].gradients
    found = join_mix({name: join(name, [rank.gradients[name] for rank in ranks], vocabulary) for name in names})
    assert found.keys() == expected.keys()
    assert {name: far for name, value in found.items() if (far := distance(value, expected[name])) > TOLERANCE} == {}


def distance(found: Tensor, expected: Tensor) -> float:
    """Euclidean distance over the length of what is expected, which may be zero but for rounding."""
    assert found.dtype == expected.dtype == torch.float64
    return float((found - expected).norm() / expected.norm().clamp(min=1e-3))


@every_model
def test_one_rank_equals_the_reference_in_fp64(name: str, alone: TensorParallel) -> None:
    assert_equals_reference(MODELS[name], [evaluate(MODELS[name], alone, LENGTH)])


@pytest.mark.ranks
@every_model
def test_two_tensor_ranks_equal_the_reference_in_fp64(
    name: str, two_ranks: list[tuple[dict[str, Evaluation], Entrance]]
) -> None:
    assert_equals_reference(MODELS[name], [evaluations[name] for evaluations, _ in two_ranks])


@pytest.mark.parametrize("length", [2, 3, BASE["max_position_embeddings"]])
def test_any_length_up_to_the_longest_equals_the_reference(length: int, alone: TensorParallel) -> None:
    """Also where the memory holds nothing but the gap."""
    model = MODELS["stagger 2"] | {"cross_attention_window": 5}
    assert_equals_reference(model, [evaluate(model, alone, length)], length)


@pytest.mark.ranks
def test_a_gradient_that_is_not_contiguous_is_summed_over_the_tensor_ranks(
    two_ranks: list[tuple[dict[str, Evaluation], Entrance]],
) -> None:
    for _, entrance in two_ranks:
        assert torch.equal(entrance.ours, entrance.expected)


@pytest.mark.ranks
def test_megatrons_own_entrance_drops_that_sum(two_ranks: list[tuple[dict[str, Evaluation], Entrance]]) -> None:
    """The reason for ours. Should this fail with a newer release, `_ContiguousGradient` may go."""
    assert not all(torch.equal(entrance.plain, entrance.expected) for _, entrance in two_ranks)


# --- initial values ---------------------------------------------------------------------------------------------


def initial_values(model: dict[str, Any], parallel: TensorParallel, seed: int = 7) -> dict[str, Tensor]:
    """Every parameter as the package fills it."""
    config = ModelConfig.model_validate(model)
    stagformer = StagFormer(config, parallel)
    fill_parameters(stagformer.canonical_parameters(), config, parallel, seed)
    return join_mix({name: value.detach() for name, value in stagformer.canonical_parameters().items()})


@pytest.mark.parametrize("name", ["default", "three sections with everything", "shared", "sequential"])
def test_initial_values_have_the_mean_and_deviation_of_the_rule(name: str, alone: TensorParallel) -> None:
    model = MODELS[name] | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
    values = initial_values(model, alone)
    assert {key: tuple(value.shape) for key, value in values.items()} == parameter_shapes(model)
    for key, value in values.items():
        if deviation := initial_deviation(model, key):
            count = value.numel()  # five standard errors of the estimate
            assert abs(float(value.std()) / deviation - 1) < 5 / math.sqrt(2 * count), key
            assert abs(float(value.mean())) < 5 * deviation / math.sqrt(count), key
        else:
            constant = 1 / len(model["section_layers"]) if key == "section_mix" else float("null_memory" not in key)
            torch.testing.assert_close(value, torch.full_like(value, constant), rtol=1e-7, atol=0)


def test_initial_values_depend_on_seed_and_name_alone(alone: TensorParallel) -> None:
    values, same, other = (initial_values(MODELS["default"], alone, seed) for seed in (7, 7, 8))
    drawn = [name for name in values if initial_deviation(MODELS["default"], name)]
    longer = initial_values(MODELS["default"] | {"section_layers": [1, 2]}, alone)
    for name in drawn:
        assert torch.equal(values[name], same[name])
        assert not torch.equal(values[name], other[name])
        if not name.endswith(("o_proj.weight", "down_proj.weight")):  # whose deviation falls with the depth
            assert torch.equal(values[name], longer[name])
    first, second = (f"sections.{section}.layers.0.self_attention.q_proj.weight" for section in (0, 1))
    assert not torch.equal(values[first], values[second])


@every_model
def test_the_layout_lists_what_the_model_owns(name: str) -> None:
    specs = model_parameters(ModelConfig.model_validate(MODELS[name]))
    assert {spec.name: spec.shape for spec in specs} == parameter_shapes(MODELS[name])
