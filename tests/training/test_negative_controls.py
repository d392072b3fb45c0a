"""Negative controls: the comparison with the reference notices planted faults."""

import pytest

from tests.reference.training import train
from tests.training.comparison import mismatches, reports, weight_mismatches
from tests.training.parity_cases import BAD_STEP, BAD_STEP_CASES, FAULTY_CASES, LEARNING_RATES, Case, for_each

pytestmark = pytest.mark.ranks

SYMPTOMS = {
    "tied gradients stay apart": "hold different copies",
    "memory is not shifted": "loss of step 0",
    "replicas read the same samples": "loss of step 0",
    "tensor ranks keep their partial gradients": "hold different values",
    "clipped by half the norm": "update: head.weight",
    "norm counts copies twice": "norm of step 0",
}
"""Text that the comparison must report about each fault, possibly among others."""


@for_each(FAULTY_CASES)
def test_a_planted_fault_is_noticed(case: Case) -> None:
    problems = mismatches(case)
    assert any(SYMPTOMS[str(case.fault)] in problem for problem in problems), problems


@for_each(FAULTY_CASES[:3])
def test_the_audit_notices_copies_that_are_trained_apart(case: Case) -> None:
    assert case.fault == "tied gradients stay apart"
    for rank in reports(case):
        assert " differs between rank 0 (" in rank.differences[-1]


def test_half_the_clipping_norm_shows_in_nothing_but_the_weights_of_the_first_step() -> None:
    case = next(case for case in FAULTY_CASES if case.fault == "clipped by half the norm")
    assert not any("step 0" in problem for problem in mismatches(case))


@for_each(BAD_STEP_CASES)
def test_an_infinite_gradient_is_reported_to_the_gate(case: Case) -> None:
    for step in range(len(LEARNING_RATES)):
        finite = [rank.finite[step] for rank in reports(case)]
        assert all(finite) == (step != BAD_STEP), finite


@for_each(BAD_STEP_CASES)
def test_a_bad_step_leaves_no_trace_in_weights_or_optimizer(case: Case) -> None:
    good = [step for step in range(len(LEARNING_RATES)) if step != BAD_STEP]
    record = train(
        case.parameters(),
        case.model_keys,
        [case.batches()[step] for step in good],
        [LEARNING_RATES[step] for step in good],
        max_grad_norm=case.max_grad_norm,
        eps=case.eps,
    )
    assert weight_mismatches(case, record, reports(case)) == []
