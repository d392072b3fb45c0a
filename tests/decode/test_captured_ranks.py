"""Steps that are one graph on every rank give the tokens of plain steps in one process."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions
from tests.decode.decoding import Case, prompt, run_cases
from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS

pytestmark = pytest.mark.ranks

GRIDS = ((2, 1), (3, 1), (1, 2), (2, 2), (4, 1))
"""(pipe, tensor) sizes."""
USUAL: dict[tuple[int, int], dict[str, tuple[str, ...]]] = {
    (2, 1): {"unequal sections": ("last", "sharded"), "stagger 0": ("sharded",), "combined": ("sharded",),
             "sequential": ("last",), "four on two": ("last",)},
    (3, 1): {"three sections with everything": ("last", "sharded")},
    (2, 2): {"unequal sections": ("sharded",)},
}  # fmt: skip
"""Models and heads that `make test` runs on each grid."""
FOUR: dict[str, Any] = {"section_layers": [1, 1, 1, 1]}
MODELS = VARIANTS | {
    "four on two": FOUR | {"stagger": 2},
    "four on two, sequential": FOUR | {"connection": "sequential"},
}
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 2},
]
"""Every way of choosing, alone and beside others."""
REQUESTS = [
    Request(str(length), prompt(length), SamplingParams(max_new_tokens=new, seed=length, **params))
    for (length, new), params in zip(((1, 8), (2, 3), (4, 9), (6, 2), (13, 11), (20, 4)), PARAMS, strict=True)
]
OPTIONS = EngineOptions(precision="fp64", chunk_size=5, num_slots=3, graphs=True)


def cases_of(pipe: int, tensor: int) -> list[Case]:
    """Every model that fits on a grid, with each head."""
    heads = ("last", "sharded") if pipe > 1 else ("last",)
    return [
        Case(name, keys, REQUESTS, replace(OPTIONS, head=head, tensor_parallel_size=tensor))  # type: ignore[arg-type]
        for name, keys in MODELS.items()
        if len(keys.get("section_layers", [1, 1])) % pipe == 0
        for head in heads
    ]


def is_usual(pipe: int, tensor: int, case: Case) -> bool:
    """Run by `make test`."""
    return case.options.head in USUAL.get((pipe, tensor), {}).get(case.name, ())


@cache
def tokens(pipe: int, tensor: int, *, usual: bool) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """Tokens of the requests by model and head, for all cases of a grid at once."""
    cases = [case for case in cases_of(pipe, tensor) if is_usual(pipe, tensor, case) == usual]
    ran = run_ranks("tests.decode.decoding:run_captured", pipe * tensor, cases)[0]
    return {
        (case.name, case.options.head): [each.token_ids for each in done.completions]
        for case, done in zip(cases, ran, strict=True)
    }


@cache
def expected(name: str) -> list[tuple[int, ...]]:
    """Tokens of plain steps in one process."""
    (ran,) = run_cases([Case(name, MODELS[name], REQUESTS, replace(OPTIONS, graphs=False))])
    return [each.token_ids for each in ran.completions]


def _named(grid: tuple[int, int], case: Case) -> Any:
    marks = [] if is_usual(*grid, case) else [pytest.mark.slow]
    return pytest.param(grid, case, id=f"{grid[0]}x{grid[1]}-{case.name}-{case.options.head}", marks=marks)


@pytest.mark.parametrize(
    ("grid", "case"),
    [_named(grid, case) for grid in GRIDS for case in cases_of(*grid)],
)
def test_replays_on_every_rank_give_the_tokens_of_plain_steps(grid: tuple[int, int], case: Case) -> None:
    found = tokens(*grid, usual=is_usual(*grid, case))[case.name, case.options.head]
    assert found == expected(case.name)


FEW = [replace(each, params=replace(each.params, max_new_tokens=3)) for each in REQUESTS[1:3]]
INTERPRETED = (2, 1), "stagger 2", "sharded"
"""What `make test` runs of the kernels on several ranks: Triton's interpreter takes long."""


def is_interpreted(pipe: int, tensor: int, case: Case) -> bool:
    """Run by `make test`."""
    return ((pipe, tensor), case.name, case.options.head) == INTERPRETED


@cache
def interpreted(pipe: int, tensor: int, *, usual: bool) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """As `tokens`, with Triton kernels in the interpreter; nothing is captured."""
    cases = [case for case in cases_of(pipe, tensor) if is_interpreted(pipe, tensor, case) == usual]
    with_kernels = [replace(case, requests=FEW, options=replace(case.options, kernels=True)) for case in cases]
    environment = {"TRITON_INTERPRET": "1"}
    ran = run_ranks("tests.decode.decoding:run_cases", pipe * tensor, with_kernels, env=environment)[0]
    return {
        (case.name, case.options.head): [each.token_ids for each in done.completions]
        for case, done in zip(cases, ran, strict=True)
    }


def _interpreted(grid: tuple[int, int], case: Case) -> Any:
    marks = [] if is_interpreted(*grid, case) else [pytest.mark.slow]
    return pytest.param(grid, case, id=f"{grid[0]}x{grid[1]}-{case.name}-{case.options.head}", marks=marks)


@pytest.mark.parametrize(
    ("grid", "case"), [_interpreted(grid, case) for grid in ((2, 1), (1, 2)) for case in cases_of(*grid)]
)
def test_kernels_on_every_rank_give_the_tokens_of_plain_steps(grid: tuple[int, int], case: Case) -> None:
    found = interpreted(*grid, usual=is_interpreted(*grid, case))[case.name, case.options.head]
    assert found == [tokens[:3] for tokens in expected(case.name)[1:3]]
