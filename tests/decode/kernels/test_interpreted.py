"""Kernels give what plain torch gives: each part of a layer, and the tokens of complete requests."""

from dataclasses import replace
from typing import Any

import pytest

from stagdist.decode.layers.weights import WeightFormat
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions
from tests.decode.decoding import Case, prompt
from tests.decode.kernels.twins import Served, Shape
from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS

pytestmark = pytest.mark.ranks

GROUPED = {"num_key_value_heads": 2, "head_dim": 6, "cross_attention_key_value_heads": 4, "cross_attention_window": 5}
SHAPES = {
    "grouped queries, heads of six, window, splits, an unused row": Shape(GROUPED, (-1, 0, 38)),
    "rows of two sections, bf16": Shape(
        {"num_attention_heads": 2, "cross_attention_window": 3}, (22, 2), "bf16", repeats=2
    ),
    "rows of three sections, an unused request": Shape({"num_attention_heads": 1}, (33, -1), repeats=3),
    "many rows": Shape({"num_attention_heads": 1}, (0, 1, 2, 3, 4, 5, 6, -1, 8), repeats=2),
    "a sum over ranks, fp32": Shape({"num_attention_heads": 2, "num_key_value_heads": 1}, (7,), "fp32", doubled=True),
    "int8, grouped queries, window": Shape(GROUPED, (0, 38), weights="int8"),
    "int8, rows of two sections": Shape({"num_attention_heads": 1}, (22, -1, 3), repeats=2, weights="int8"),
    "int8, bf16, a sum over ranks": Shape({"num_attention_heads": 2}, (7,), "bf16", doubled=True, weights="int8"),
    "int8, many rows": Shape({"num_attention_heads": 1}, (1, 2, 3, 4, 5, 6, 7, -1, 8), "fp32", weights="int8"),
}
PARTS_OF_VARIANTS = 7
TOLERANCES = {"fp64": 1e-12, "fp32": 2e-6, "bf16": 0.03}
PARTS = {"self", "input", "cross", "mlp", "cache", "memory", "unserved", "unserved cache"}
OPTIONS = EngineOptions(precision="fp64", chunk_size=5, num_slots=2, graphs=False)


def served_case(
    name: str, keys: dict[str, Any], new_tokens: tuple[int, int], weights: WeightFormat | None = None
) -> Case:
    """Two requests, one of which ends before the other."""
    requests = [
        Request(str(length), prompt(length), SamplingParams(max_new_tokens=new, temperature=0.0))
        for length, new in zip((1, 13), new_tokens, strict=True)
    ]
    return Case(name, keys, requests, replace(OPTIONS, weights=weights))


CASES = [
    served_case("everything", VARIANTS["three sections with everything"], (2, 3)),
    served_case(
        "two sections, window, int8", {"num_attention_heads": 2, "cross_attention_window": 3}, (2, 4), weights="int8"
    ),
]
Found = tuple[dict[str, dict[str, float]], list[Served]]


@pytest.fixture(scope="module")
def found() -> Found:
    """Everything the interpreter computes. It must be chosen before triton is imported, so in another process."""
    (result,) = run_ranks("tests.decode.kernels.twins:perform", 1, (SHAPES, CASES), env={"TRITON_INTERPRET": "1"})
    return result


@pytest.mark.parametrize("name", SHAPES)
def test_each_part_of_a_layer_is_that_of_plain_torch(found: Found, name: str) -> None:
    differences = found[0][name]
    assert set(differences) == PARTS
    for part, difference in differences.items():
        assert difference < TOLERANCES[SHAPES[name].precision], part


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_requests_get_the_same_tokens(found: Found, number: int) -> None:
    served = found[1][number]
    assert [len(tokens) for tokens in served.plain] == [each.params.max_new_tokens for each in CASES[number].requests]
    assert served.kernels == served.plain
    assert served.difference < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS_OF_VARIANTS))
def test_every_variant_gets_the_same_tokens(part: int) -> None:
    cases = [served_case(name, keys, (3, 5)) for name, keys in VARIANTS.items()]
    shared = next(case for case in cases if case.name == "shared")
    cases.append(replace(shared, name="recurrent", options=replace(OPTIONS, recurrent=True)))
    cases.append(replace(shared, name="int8", options=replace(OPTIONS, weights="int8")))
    cases = cases[part::PARTS_OF_VARIANTS]
    (result,) = run_ranks("tests.decode.kernels.twins:perform", 1, ({}, cases), env={"TRITON_INTERPRET": "1"})
    for case, served in zip(cases, result[1], strict=True):
        assert served.kernels == served.plain, case.name
        assert served.difference < 1e-12, case.name
