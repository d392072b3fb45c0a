"""The fixed-shape step, which a CUDA graph captures, gives what the plain one gives; here without capturing."""

from dataclasses import replace

import pytest

from stagdist.config import ModelConfig
from stagdist.decode.loading import EngineOptions, place_model
from stagdist.decode.request import Request, SamplingParams
from stagdist.errors import ConfigError
from tests.decode.decoding import Case, config_of, prompt, run_cases
from tests.reference.variants import VARIANTS

REQUESTS = [
    Request(str(length), prompt(length), SamplingParams(max_new_tokens=new, temperature=temperature, seed=length))
    for length, new, temperature in ((1, 8, 0.0), (2, 3, 1.0), (4, 9, 0.0), (6, 2, 0.7), (13, 11, 0.0), (24, 4, 1.0))
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_fixed_shape_gives_the_same_tokens(variant: str) -> None:
    options = EngineOptions(precision="fp64", chunk_size=5, num_slots=3, graphs=False)
    plain = Case(variant, VARIANTS[variant], REQUESTS, options)
    fixed = replace(plain, options=replace(options, graphs=True))
    first, second = run_cases([plain, fixed])
    assert [each.token_ids for each in first.completions] == [each.token_ids for each in second.completions]
    difference = max(
        (a[2] - b[2]).abs().max().item() for a, b in zip(first.logits, second.logits, strict=True) if a[1] == b[1]
    )
    assert difference < 1e-9


def test_recurrent_decoding_works_with_fixed_shapes() -> None:
    options = EngineOptions(precision="fp64", chunk_size=5, num_slots=2, recurrent=True, graphs=False)
    plain = Case("recurrent", VARIANTS["shared"], REQUESTS, options)
    first, second = run_cases([plain, replace(plain, options=replace(options, graphs=True))])
    assert [each.token_ids for each in first.completions] == [each.token_ids for each in second.completions]


def test_graphs_are_refused_where_a_step_spans_processes() -> None:
    with pytest.raises(ConfigError, match="one process"):
        place_model(ModelConfig(**config_of({})), EngineOptions(graphs=True), 2)
