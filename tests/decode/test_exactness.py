"""Staggered decoding gives what full recomputation with the reference gives, on every grid and for every variant."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions
from stagdist.decode.topology import HeadLayout
from tests.decode.comparison import CLEAR_MARGIN, compare
from tests.decode.decoding import CONTEXT, Case, Ran, config_of, prompt, run_cases
from tests.ranks import run_ranks
from tests.reference import stagformer as reference
from tests.reference.variants import VARIANTS

pytestmark = pytest.mark.ranks

CHUNK = 5
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (4, 1)]
"""(pipe, tensor) sizes."""
COMBINATIONS: dict[str, dict[str, Any]] = {
    "shared, stagger 2, window": {
        "section_layers": [2, 2],
        "share_section_weights": True,
        "stagger": 2,
        "cross_attention_window": 3,
    },
    "four sections, stagger 2, window of two": {
        "section_layers": [1, 1, 1, 1],
        "stagger": 2,
        "cross_attention_window": 2,
    },
    "four shared, combined": {
        "section_layers": [1, 1, 1, 1],
        "share_section_weights": True,
        "combine_sections": True,
        "num_key_value_heads": 2,
    },
    "window of one": {"cross_attention_window": 1},
    "window of the whole context": {"cross_attention_window": CONTEXT},
    "combined, tied, stagger 0": {"combine_sections": True, "tie_word_embeddings": True, "stagger": 0},
}
INT8 = ("tied", "sequential", "grouped queries", "shared")
"""Variants that also run with weights in int8, in fp64."""
SHARDED = {
    "four sections", "unequal sections", "stagger 0", "combined", "tied", "sequential", "whole vocabulary",
    "shared, stagger 2, window", "combined, tied, stagger 0", "tied, int8",
}  # fmt: skip
"""Cases that two stages run with a sharded head in `make test`."""
ALIKE_ON_TENSOR_RANKS = {
    "one section, tied", "three sections", "four sections", "stagger 2", "window", "sequential, tied",
    "llama3 scaling", "four combined sections",
}  # fmt: skip
"""Cases that split over tensor ranks as others do."""
ON_LARGEST = {"unequal sections", "grouped queries", "combined", "tied", "sequential", "tied, int8"}
LENGTHS = (1, 2, CHUNK - 1, CHUNK + 1, 13, CONTEXT)
TO_THE_END = {13: 100}
"""Lengths whose requests go on until the context is full, and the tokens they ask for."""
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-4}


def requests(lengths: tuple[int, ...], max_new_tokens: int) -> list[Request]:
    """Greedy requests; the longest prompt has room for one token."""
    return [
        Request(
            str(length),
            prompt(length),
            SamplingParams(max_new_tokens=TO_THE_END.get(length, max_new_tokens), temperature=0.0),
        )
        for length in lengths
    ]


def cases_of(pipe: int, tensor: int) -> list[Case]:
    """All cases that fit on a grid: in fp64, and on the 2x2 grid with one head also in fp32.

    Sums over tensor ranks make a step of such a small model ten times slower, so these grids decode fewer tokens.
    """
    heads: tuple[HeadLayout, ...] = ("last", "sharded") if pipe > 1 else ("last",)
    served = dict.fromkeys(TOLERANCES, requests(LENGTHS, 7))
    if tensor > 1:
        short = tuple(length for length in LENGTHS if length not in TO_THE_END)
        served = {"fp64": requests(short, 3), "fp32": requests((2, CHUNK + 1, CONTEXT), 2)}
    named = VARIANTS | COMBINATIONS
    fitting = {name: keys for name, keys in named.items() if len(keys.get("section_layers", [1, 1])) % pipe == 0}
    cases = [
        Case(name, keys, served[precision], EngineOptions(tensor, head, chunk_size=CHUNK, precision=precision))
        for name, keys in fitting.items()
        for head in heads
        for precision in (("fp64", "fp32") if (pipe, tensor, head) == (2, 2, "last") else ("fp64",))
    ]
    rounded = [case for case in cases if case.name in INT8 and case.options.precision == "fp64"]
    return cases + [
        replace(case, name=f"{case.name}, int8", options=replace(case.options, weights="int8")) for case in rounded
    ]


def is_nightly(grid: tuple[int, int], case: Case) -> bool:
    """What `make test` leaves out.

    On two tensor ranks: combinations, which run on stages, and `ALIKE_ON_TENSOR_RANKS`. On the largest grid: the
    sharded head, and all but `ON_LARGEST`. On two stages: the sharded head with all but `SHARDED`.
    """
    name, sharded = case.name, case.options.head == "sharded"
    if grid == (2, 1):
        return sharded and name not in SHARDED
    if grid == (2, 2):
        return sharded or name not in ON_LARGEST
    return grid == (1, 2) and (name in COMBINATIONS or name in ALIKE_ON_TENSOR_RANKS)


class Runs:
    """The cases of every grid, run by the first test that asks for one of them; nightly ones apart."""

    def __init__(self) -> None:
        self._ran: dict[tuple[tuple[int, int], bool], list[list[Ran]]] = {}

    def ranks(self, grid: tuple[int, int], case: Case) -> list[Ran]:
        """What every rank did in a case of a grid."""
        nightly = is_nightly(grid, case)
        cases = [each for each in cases_of(*grid) if is_nightly(grid, each) == nightly]
        key, (pipe, tensor) = (grid, nightly), grid
        if key not in self._ran:
            if pipe * tensor == 1:
                self._ran[key] = [run_cases(cases)]
            else:
                self._ran[key] = run_ranks("tests.decode.decoding:run_cases", pipe * tensor, cases)
        return [results[cases.index(case)] for results in self._ran[key]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


def _named(grid: tuple[int, int], case: Case) -> Any:
    label = f"{grid[0]}x{grid[1]}-{case.name}-{case.options.head}-{case.options.precision}"
    return pytest.param(grid, case, id=label, marks=[pytest.mark.slow] * is_nightly(grid, case))


@pytest.mark.parametrize(("grid", "case"), [_named(grid, case) for grid in GRIDS for case in cases_of(*grid)])
def test_tokens_and_logits_are_those_of_full_recomputation(runs: Runs, grid: tuple[int, int], case: Case) -> None:
    precision = case.options.precision
    assert precision is not None
    double = precision == "fp64"
    ranks = runs.ranks(grid, case)
    compared = compare(case, ranks, margin=0.0 if double else CLEAR_MARGIN)
    assert compared.wrong_tokens == 0
    assert compared.difference < TOLERANCES[precision]
    total = sum(len(done.token_ids) for done in ranks[0].completions)
    assert compared.tokens > 0.9 * total, "hardly a margin is clear: the comparison says nothing"
    assert compared.logits == total * config_of(case.keys)["vocab_size"], "a part of the vocabulary is missing"


def case_named(name: str) -> tuple[Case, list[Ran]]:
    """A case of one process, freshly run."""
    case = next(each for each in cases_of(1, 1) if each.name == name and each.options.precision == "fp64")
    return case, run_cases([case])


def test_the_comparison_notices_another_stagger() -> None:
    case, ranks = case_named("unequal sections")
    assert compare(case, ranks).difference < 1e-9
    other = compare(case, ranks, config_of(case.keys | {"stagger": 2}))
    assert other.difference > 1e-2 and other.wrong_tokens > 0


def test_the_comparison_notices_weights_that_are_not_rounded() -> None:
    case, ranks = case_named("tied, int8")
    assert compare(case, ranks).difference < 1e-9
    exact = replace(case, options=replace(case.options, weights=None))
    assert compare(exact, ranks).difference > 1e-3


def test_the_comparison_notices_another_window() -> None:
    case, ranks = case_named("window")
    assert compare(case, ranks, config_of(case.keys | {"cross_attention_window": 4})).difference > 1e-2


def test_the_comparison_notices_a_memory_that_is_not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ranks = case_named("unequal sections")

    def memory(
        parameters: reference.Parameters, shape: reference.Shape, section: int, previous: torch.Tensor
    ) -> torch.Tensor:
        null = parameters[f"sections.{section}.null_memory"].expand(len(previous), 1, -1)
        return torch.cat([null, previous[:, :-1]], dim=1)

    monkeypatch.setattr(reference, "memory", memory)
    other = compare(case, ranks)
    assert other.difference > 1e-2 and other.wrong_tokens > 0


@pytest.mark.parametrize("lag", [1, 2])
def test_chunks_of_other_sizes_on_two_stages_change_nothing(lag: int) -> None:
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    keys = {"max_position_embeddings": 256, "section_layers": [2, 1], "stagger": lag}
    requests = [Request(str(length), prompt(length), params) for length in (67, 230)]
    case = Case("tapering", keys, requests, EngineOptions(precision="fp64", chunk_size=256))
    ((one,), (_, (last,))) = run_cases([case]), run_ranks("tests.decode.decoding:run_cases", 2, [case])
    assert [at for *at, _ in last.logits] == [at for *at, _ in one.logits] and len(one.logits) == 8
    for (*_, mine), (*_, theirs) in zip(one.logits, last.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
