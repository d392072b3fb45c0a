"""A run resumes on any grid from a checkpoint of any other, with the losses of the run that was never stopped."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS
from tests.training.comparison import full_tensors
from tests.training.parity_cases import Case, label
from tests.training.saving.resume_worker import Leg, LegReport

pytestmark = pytest.mark.ranks

Grid = tuple[int, int, int]
Journey = tuple[Case, Grid, Grid]
"""A model, where it is saved, and where it continues."""
STEPS = 2
CENTER = (2, 1, 2)
EVERYTHING = VARIANTS["shared"] | {"tie_word_embeddings": True, "combine_sections": True}
MODELS = [
    Case("separate", {}, CENTER),
    Case("shared, tied and combined", EVERYTHING, CENTER),
    Case("sequential, tied, bf16", VARIANTS["sequential, tied"], CENTER, precision="bf16"),
]
OTHER_GRIDS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2)]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def others(case: Case) -> list[Grid]:
    """Grids on which a model continues: the first one on all, others where everything is joined and where every axis
    changes. `make resume-matrix` runs the rest."""
    return OTHER_GRIDS if case is MODELS[0] else [OTHER_GRIDS[0], OTHER_GRIDS[-1]]


def saving(runs: Path, case: Case) -> Leg:
    """The leg that trains and saves on the case's grid."""
    return Leg(case, runs, f"{case.name} {label(case.grid)}".replace(" ", "-"), STEPS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of all runs."""
    yield tmp_path_factory.mktemp("grids")
    saved.cache_clear()
    resumed.cache_clear()


@cache
def saved(runs: Path, *, usual: bool) -> dict[str, list[LegReport]]:
    """Every model trained and saved on each grid where a journey starts; reports by run."""
    starts = {(case.name, start): replace(case, grid=start) for case, start, _ in journeys(usual=usual)}
    return _launched("save_legs", [saving(runs, case) for case in starts.values()])


@cache
def resumed(runs: Path, *, usual: bool) -> dict[str, list[LegReport]]:
    """All journeys, after `saved`; reports by journey."""
    return _launched("resume_legs", [arriving(runs, *each) for each in journeys(usual=usual)])


def arriving(runs: Path, case: Case, start: Grid, end: Grid) -> Leg:
    """The leg that continues a journey at its end."""
    return replace(saving(runs, replace(case, grid=start)), case=replace(case, grid=end))


def _launched(function: str, legs: list[Leg]) -> dict[str, list[LegReport]]:
    """One launch for each world size; legs in the order of their grids."""
    found: dict[str, list[LegReport]] = {}
    for size in sorted({leg.case.world_size for leg in legs}):
        here = sorted((leg for leg in legs if leg.case.world_size == size), key=lambda leg: leg.case.grid)
        ranks = run_ranks(f"tests.training.saving.resume_worker:{function}", size, here, timeout_s=300)
        found |= {journey(leg): [reports[index] for reports in ranks] for index, leg in enumerate(here)}
    return found


def journey(leg: Leg) -> str:
    """The run and the grid on which it continues."""
    return f"{leg.name} on {label(leg.case.grid)}"


def journeys(*, usual: bool) -> list[Journey]:
    """Those that `make test` makes, or all others."""
    return [each for each in JOURNEYS if is_usual(*each) == usual]


def is_usual(case: Case, start: Grid, end: Grid) -> bool:
    """Whether `make test` makes a journey. Those through 2x1x1 are nightly: 1x1x1 and 2x2x1 show as much."""
    other = start if end == CENTER else end
    if end == CENTER:
        return other in ((1, 1, 1), (2, 2, 1))
    return other != (2, 1, 1) and (case.precision == "fp32" or other == OTHER_GRIDS[-1])


JOURNEYS = [(case, CENTER, grid) for case in MODELS for grid in others(case)] + [
    (MODELS[0], grid, CENTER) for grid in OTHER_GRIDS
]


@pytest.mark.parametrize(
    ("case", "start", "end"),
    [
        pytest.param(
            *each,
            id=f"{each[0].name} {label(each[1])} to {label(each[2])}",
            marks=[pytest.mark.slow] * (not is_usual(*each)),
        )
        for each in JOURNEYS
    ],
)
def test_training_resumes_on_another_grid(case: Case, start: Grid, end: Grid, runs: Path) -> None:
    usual = is_usual(case, start, end)
    runs = runs / ("usual" if usual else "others")
    leg = saving(runs, replace(case, grid=start))
    before = saved(runs, usual=usual)[journey(leg)]
    after = resumed(runs, usual=usual)[journey(arriving(runs, case, start, end))]
    vocabulary = case.model_keys["vocab_size"]
    expected = full_tensors([(rank.place, rank.parameters) for rank in before], vocabulary)
    found = full_tensors([(rank.place, rank.parameters) for rank in after], vocabulary)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert {rank.step for rank in after} == {STEPS}
    for rank in after:
        assert 0 < rank.read_bytes <= rank.share_bytes  # which counts the padding of the vocabulary too
        difference = max(abs(a - b) for a, b in zip(rank.losses, before[0].losses, strict=True))
        assert difference <= TOLERANCE[case.precision], (rank.losses, before[0].losses)
    checkpoints = runs / leg.name / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [f"step_{STEPS:08d}"], "nothing else is written"
