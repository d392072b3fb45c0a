"""`training.deterministic`: every model trains with deterministic kernels only, and repeats its losses exactly."""

import os
from dataclasses import replace

import pytest
import torch

from stagdist.training.engine.section_engine import build_engine
from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS
from tests.training.parity_cases import Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

pytestmark = pytest.mark.ranks

EVERYTHING = VARIANTS["three sections with everything"]
USUAL = {"stagger 0", "window", "shared", "grouped queries", "sequential, tied", "llama3 scaling"}
"""Variants that `make test` trains; the case in bf16 has everything."""
CASES = [
    *(Case(name, model, (1, 1, 1), nightly=name not in USUAL) for name, model in VARIANTS.items()),
    Case("bf16, checkpointing", EVERYTHING, (1, 1, 1), precision="bf16", checkpointing="layer"),
]


def losses_twice(cases: list[Case]) -> dict[str, list[list[float]]]:
    """Losses of two runs of each case; that of the second step depends on the update of the first."""
    world = World(60.0, deterministic=True)
    found = {case.name: [_losses(case, world) for _ in range(2)] for case in cases}
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    return found


def _losses(case: Case, world: World) -> list[float]:
    groups = world.groups(case.grid)
    engine = build_engine(case.config(), groups)
    return [float(engine.train_batch(micro_batches(case, groups, *batch))) for batch in case.batches()[:2]]


NIGHTLY = [case for case in CASES if case.nightly]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([case for case in CASES if not case.nightly], id="usual"),
        pytest.param(NIGHTLY, id="others", marks=pytest.mark.slow),
        pytest.param([replace(CASES[-1], grid=(1, 1, 2))], id="tensor ranks"),
    ],
)
def test_every_model_trains_with_deterministic_kernels(cases: list[Case]) -> None:
    payload = "tests.training.engine.test_deterministic:losses_twice"
    for found in run_ranks(payload, cases[0].world_size, cases):
        assert found.keys() == {case.name for case in cases}
        assert all(first == second for first, second in found.values()), found
