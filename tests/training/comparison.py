"""The distributed runs against the reference: launching, putting the ranks' parts together, comparing."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from stagdist.parallel.grid import Coordinate
from tests.ranks import GUARD_S, RankError, run_ranks
from tests.reference.sharding import join, join_mix
from tests.reference.training import TrainingRecord, global_norm, train
from tests.training.parity_cases import (
    BAD_STEP_CASES,
    BF16_CASES,
    CASES,
    FAULTY_CASES,
    GPU_CASES,
    LEARNING_RATES,
    Case,
)
from tests.training.parity_worker import RankReport

WORKER = "tests.training.parity_worker:run_cases"


@dataclass(frozen=True)
class Tolerance:
    """How far a run may be from the reference.

    Attributes:
        loss: nats.
        norm: relative.
        gradient: relative, Euclidean, per tensor.
        weight: the same for the values after the last step.
        update: the same for what all steps together changed; None where rounding of the weights hides it.
    """

    loss: float
    norm: float
    gradient: float
    weight: float
    update: float | None


FP32 = Tolerance(loss=1e-5, norm=1e-5, gradient=1e-5, weight=1e-6, update=1e-3)
BF16 = Tolerance(loss=1e-2, norm=1e-2, gradient=0.1, weight=1e-2, update=None)
"""bf16 has 8 significant bits; on these models losses were 0.3 % and gradients at most 5 % away."""


def reports(case: Case) -> list[RankReport]:
    """The reports of a case, by rank.

    All cases of a world size and device share one launch, which the first of them starts; nightly ones have another.
    """
    launched = _launch(case.world_size, case.device, case.nightly)
    if isinstance(launched, RankError):
        raise launched
    return [rank[case.name] for rank in launched]


@cache
def _launch(world_size: int, device: str, nightly: bool) -> list[dict[str, RankReport]] | RankError:
    every_case = CASES + BF16_CASES + FAULTY_CASES + BAD_STEP_CASES + GPU_CASES
    wanted = (world_size, device, nightly)
    cases = [case for case in every_case if (case.world_size, case.device, case.nightly) == wanted]
    try:
        return run_ranks(WORKER, world_size, cases, timeout_s=2 * GUARD_S, env=on_device(device))
    except RankError as error:  # cached, so that not every case repeats a failed launch
        return error


def on_device(device: str) -> dict[str, str]:
    """Environment variables with which ranks see this device; by default the launch hides CUDA."""
    if device == "cpu":
        return {}
    return {"DS_ACCELERATOR": device, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


def reference(case: Case) -> TrainingRecord:
    """The same run by the reference, in fp32."""
    return _train(json.dumps(case.model), case.max_grad_norm, case.eps, case.sequence_length)


@cache
def _train(model: str, max_grad_norm: float, eps: float, sequence_length: int) -> TrainingRecord:
    case = Case("reference", json.loads(model), (1, 1, 1), sequence_length=sequence_length)
    return train(
        case.parameters(),
        case.model_keys,
        case.batches(),
        LEARNING_RATES,
        max_grad_norm=max_grad_norm,
        eps=eps,
        gradients_of=range(len(LEARNING_RATES)),
    )


def full_tensors(ranks: Sequence[tuple[Coordinate, dict[str, Tensor]]], vocab_size: int) -> dict[str, Tensor]:
    """Tensors of the full model, joined from the parts of the ranks.

    Raises:
        AssertionError: stages, replicas or tensor ranks that hold the same tensor differ in a single bit.
    """
    parts: dict[str, dict[tuple[int, int], dict[int, Tensor]]] = {}
    for place, named in ranks:
        for name, value in named.items():
            parts.setdefault(name, {}).setdefault((place.pipe, place.data), {})[place.tensor] = value
    joined = {}
    for name, copies in parts.items():
        values = [join(name, [shards[rank] for rank in sorted(shards)], vocab_size) for shards in copies.values()]
        for value in values[1:]:
            assert torch.equal(value, values[0]), f"{name}: stages or replicas hold different copies"
        joined[name] = values[0]
    return join_mix(joined)


def mismatches(case: Case, ranks: Sequence[RankReport] | None = None) -> list[str]:
    """All differences between a run and the reference, as text; empty if there are none.

    Args:
        ranks: reports of all ranks; `reports(case)` by default.
    """
    ranks = ranks or reports(case)
    record, tolerance = reference(case), FP32 if case.precision == "fp32" else BF16
    problems = _number_mismatches(ranks, record, tolerance) + [text for rank in ranks for text in rank.differences]
    try:
        for step, expected in record.gradients.items():
            found = full_tensors([(rank.place, rank.gradients[step]) for rank in ranks], case.model_keys["vocab_size"])
            problems += tensor_mismatches(f"gradient of step {step}", found, expected, tolerance.gradient)
            problems += _norm_mismatch(f"norm of step {step}", ranks[0].norms[step], global_norm(found))
        problems += weight_mismatches(case, record, ranks)
    except AssertionError as difference:
        problems.append(str(difference))
    return problems


def weight_mismatches(case: Case, record: TrainingRecord, ranks: Sequence[RankReport]) -> list[str]:
    """Differences in the weights after the last step, and in what all steps together changed."""
    tolerance = FP32 if case.precision == "fp32" else BF16
    weights = full_tensors([(rank.place, rank.weights) for rank in ranks], case.model_keys["vocab_size"])
    problems = tensor_mismatches("weight", weights, record.parameters, tolerance.weight)
    if tolerance.update is not None:
        start = case.parameters()
        found = {name: value - start[name] for name, value in weights.items()}
        expected = {name: value - start[name] for name, value in record.parameters.items()}
        problems += tensor_mismatches("update", found, expected, tolerance.update)
    return problems


def _number_mismatches(ranks: Sequence[RankReport], record: TrainingRecord, tolerance: Tolerance) -> list[str]:
    problems = []
    for index, rank in enumerate(ranks):
        for step, expected in enumerate(record.losses):
            if not abs(rank.losses[step] - expected) <= tolerance.loss:
                problems.append(f"loss of step {step} on rank {index}: {rank.losses[step]}, reference {expected}")
        for step, expected in enumerate(record.grad_norms):
            if not abs(rank.norms[step] - expected) <= tolerance.norm * expected:
                problems.append(f"norm of step {step} on rank {index}: {rank.norms[step]}, reference {expected}")
    return problems


def _norm_mismatch(kind: str, reported: float, norm: float) -> list[str]:
    """The norm that was reported must be the norm of the gradients that were seen, at any precision."""
    return [] if abs(reported - norm) <= 1e-5 * norm else [f"{kind}: {reported} reported, the gradients have {norm}"]


def tensor_mismatches(kind: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> list[str]:
    """Names that only one side has, and tensors that are farther apart than the tolerance."""
    problems = [f"{kind}: {name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{kind}: {name} is unknown to the reference" for name in found.keys() - expected.keys()]
    for name in sorted(found.keys() & expected.keys()):
        distance = relative_distance(found[name], expected[name])
        if not distance <= tolerance:
            problems.append(f"{kind}: {name} is {distance:.1e} away")
    return problems


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """Euclidean distance over the length of the expected tensor; infinite for another shape."""
    if found.shape != expected.shape:
        return math.inf
    distance, length = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(distance / length) if length else (math.inf if distance else 0.0)
