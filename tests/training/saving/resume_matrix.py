"""Resume on every grid from every other: the next 10 losses must be those of the run that was never stopped.

    python -m tests.training.saving.resume_matrix --output benchmarks/results/resume-matrix.json

The full matrix takes about ten minutes on two idle cores (`make resume-matrix`). It also resumes on the same grid,
where losses must be bit-equal, and every model once in the other precision. `make test` runs only the pairs that
contain 2x1x2.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.conditions import commit
from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS
from tests.training.comparison import full_tensors
from tests.training.parity_cases import Case, label
from tests.training.saving.resume_worker import Leg, LegReport

STEPS = 10
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
TWO_SECTIONS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
THREE_SECTIONS = [(1, 1, 1), (3, 1, 2)]
THREE = {"section_layers": [1, 1, 1]}
LEGS_OF_A_LAUNCH = 12

Sizes = tuple[int, int, int]
Journey = tuple[Case, Sizes, Case]
"""The model that is saved, on which grid, and as what it resumes."""
OTHER_PRECISION = {"fp32": "bf16", "bf16": "fp32"}


def models() -> list[Case]:
    """Every model, on one rank."""
    keys = {
        "separate": {},
        "shared": VARIANTS["shared"],
        "combined": VARIANTS["combined"],
        "tied": VARIANTS["tied"],
        "sequential": VARIANTS["sequential"],
        "sequential, tied": VARIANTS["sequential, tied"],
    }
    three = {
        "separate": {},
        "combined": {"combine_sections": True},
        "shared": {"share_section_weights": True},
        "tied": VARIANTS["tied"],
        "sequential": VARIANTS["sequential"],
    }
    keys |= {f"three sections, {name}": model | THREE for name, model in three.items()}
    found = [Case(name, model, (1, 1, 1)) for name, model in keys.items()]
    return found + [replace(case, name=f"{case.name}, bf16", precision="bf16") for case in found]


def journeys() -> list[Journey]:
    """Every model from every grid to every grid, and from the first to the last in the other precision."""
    found = []
    for case in models():
        grids = TWO_SECTIONS if len(case.model_keys["section_layers"]) == 2 else THREE_SECTIONS
        found += [(case, start, replace(case, grid=end)) for start in grids for end in grids]
        other = replace(case, grid=grids[-1], precision=OTHER_PRECISION[case.precision])
        found.append((case, grids[0], other))
    case = models()[0]
    found.append((case, (2, 2, 1), replace(case, grid=(2, 2, 2))))
    return found


def saving(runs: Path, case: Case, start: Sizes) -> Leg:
    """The leg that trains and saves."""
    name = f"{case.name} {label(start)}".replace(" ", "-").replace(",", "")
    return Leg(replace(case, grid=start), runs, name, STEPS)


def _launched(function: str, legs: Sequence[Leg]) -> dict[tuple[str, str, Sizes], list[LegReport]]:
    """Reports by run and grid. A launch runs several legs, because importing the frameworks takes seconds."""
    found: dict[tuple[str, str, Sizes], list[LegReport]] = {}
    for size in sorted({leg.case.world_size for leg in legs}):
        here = sorted((leg for leg in legs if leg.case.world_size == size), key=lambda leg: leg.case.grid)
        for start in range(0, len(here), LEGS_OF_A_LAUNCH):
            part = here[start : start + LEGS_OF_A_LAUNCH]
            ranks = run_ranks(f"tests.training.saving.resume_worker:{function}", size, part, timeout_s=600)
            found |= {_key(leg): [rank[index] for rank in ranks] for index, leg in enumerate(part)}
            print(f"{function}: {size} ranks, {start + len(part)} of {len(here)}", file=sys.stderr, flush=True)
    return found


def _key(leg: Leg) -> tuple[str, str, Sizes]:
    return leg.name, leg.case.precision, leg.case.grid


def compare(journey: Journey, before: list[LegReport], after: list[LegReport]) -> dict[str, Any]:
    """How a journey changed weights and losses. Weights of another precision are compared as bf16."""
    case, start, resumed = journey
    vocabulary, same_precision = case.model_keys["vocab_size"], case.precision == resumed.precision
    expected, found = (
        full_tensors([(rank.place, rank.parameters) for rank in ranks], vocabulary) for ranks in (before, after)
    )
    if not same_precision:
        expected, found = ({name: value.bfloat16() for name, value in each.items()} for each in (expected, found))
    changed = [name for name in expected if not torch.equal(found[name], expected[name])]
    difference = max(abs(a - b) for rank in after for a, b in zip(rank.losses, before[0].losses, strict=True))
    tolerance = TOLERANCE[case.precision if same_precision else "bf16"] * (resumed != replace(case, grid=start))
    read = max(rank.read_bytes / rank.share_bytes for rank in after)
    passed = read <= 1 and not changed and difference <= tolerance and {rank.step for rank in after} == {STEPS}
    return {
        "largest_loss_difference": difference,
        "changed_tensors": changed,
        "read_bytes_over_share": read,
        "losses": after[0].losses,
        "undisturbed": before[0].losses,
        "passed": passed,
    }


def run(chosen: Iterable[Journey], runs: Path) -> list[dict[str, Any]]:
    """Results of journeys."""
    chosen = list(chosen)
    starts = {leg.name: leg for leg in (saving(runs, case, start) for case, start, _ in chosen)}
    before = _launched("save_legs", list(starts.values()))
    ends = [replace(saving(runs, case, start), case=resumed) for case, start, resumed in chosen]
    after = _launched("resume_legs", ends)
    results = []
    for (case, start, resumed), end in zip(chosen, ends, strict=True):
        outcome = compare((case, start, resumed), before[_key(saving(runs, case, start))], after[_key(end)])
        kind = "the same grid" if resumed == replace(case, grid=start) else f"another grid, {case.precision}"
        kind = kind if resumed.precision == case.precision else "another precision"
        facts = {
            "kind": kind,
            "model": case.name,
            "from": label(start),
            "to": label(resumed.grid),
            "precision": resumed.precision,
        }
        results.append(facts | outcome)
    return results


def _conditions() -> dict[str, Any]:
    return {"commit": commit(), "torch": torch.__version__, "machine": platform.machine(), "steps": STEPS}


def main() -> int:
    """Exit code 1 if a journey failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--models", metavar="TEXT", default="", help="only models with this in their name")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = run([one for one in journeys() if arguments.models in one[0].name], Path(folder))
    body = {"conditions": _conditions(), "tolerance": TOLERANCE, "seconds": time.monotonic() - started}
    Path(arguments.output).write_text(json.dumps(body | {"journeys": results}, indent=1) + "\n")
    failed = [one for one in results if not one["passed"]]
    for one in failed:
        print(f"{one['model']} {one['from']} -> {one['to']}: {one['largest_loss_difference']}", file=sys.stderr)
    for kind in dict.fromkeys(one["kind"] for one in results):
        differences = [one["largest_loss_difference"] for one in results if one["kind"] == kind]
        print(f"{kind}: {len(differences)} journeys, largest difference of a loss {max(differences):.2e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
