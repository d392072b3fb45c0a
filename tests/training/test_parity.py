"""Distributed runs through the real engine equal the independent reference, step by step and tensor by tensor."""

import pytest
import torch

from stagdist.training.publish import relative_difference
from tests.reference.stagformer import forward
from tests.training.comparison import full_tensors, mismatches, reports
from tests.training.parity_cases import BF16_CASES, CASES, Case, for_each, label

pytestmark = pytest.mark.ranks

ALONE = {str(case.model): case for case in CASES if case.world_size == 1}
"""The run of a model in one process."""
SPREAD = [case for case in CASES if case.world_size > 1 and str(case.model) in ALONE]


@for_each(CASES)
def test_losses_gradients_norms_and_weights_equal_the_reference(case: Case) -> None:
    assert mismatches(case) == []


@for_each(BF16_CASES)
def test_bf16_stays_near_the_reference(case: Case) -> None:
    assert mismatches(case) == []


@for_each(CASES + BF16_CASES)
def test_the_trained_engine_gives_the_logits_of_the_reference_on_its_weights(case: Case) -> None:
    ranks = reports(case)
    weights = full_tensors([(rank.place, rank.weights) for rank in ranks], case.model_keys["vocab_size"])
    expected = forward(weights, case.model_keys, case.text())
    assert ranks[0].logits.shape == expected.shape and all(not rank.logits.numel() for rank in ranks[1:])
    assert relative_difference(expected, ranks[0].logits) <= (1e-6 if case.precision == "fp32" else 0.02)


@for_each(SPREAD, lambda case: case.nightly or ALONE[str(case.model)].nightly)
def test_initial_values_do_not_depend_on_the_grid(case: Case) -> None:
    alone, spread = (
        full_tensors([(rank.place, rank.initial) for rank in reports(run)], run.model_keys["vocab_size"])
        for run in (ALONE[str(case.model)], case)
    )
    assert alone.keys() == spread.keys()
    assert [name for name, value in alone.items() if not torch.equal(value, spread[name])] == []


def test_every_required_grid_and_variant_is_covered() -> None:
    default = {label(case.grid) for case in CASES if not case.model and not case.nightly}
    assert default >= {"1x1x1", "2x1x1", "1x2x1", "1x1x2", "2x2x1", "2x1x2", "1x2x2", "2x2x2"}
    sections = {(len(case.config().model.section_layers), case.grid) for case in CASES}
    assert sections >= {(p, grid) for p in (1, 2, 3, 4) for grid in ((1, 1, 1), (p, 1, 1), (p, 1, 2))}
    assert (4, (2, 1, 1)) in sections
    assert {case.checkpointing for case in CASES} == {"none", "layer"}


def test_clipping_acts_in_these_runs() -> None:
    case = CASES[0]
    assert min(reports(case)[0].norms) > 5 * case.max_grad_norm
