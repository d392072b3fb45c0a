"""Recurrent decoding is the plain loop of its recurrence, and is refused where none is defined."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from stagdist.config.parts import ModelConfig
from stagdist.decode.request import Request, RequestOutput, SamplingParams
from stagdist.decode.runtime.build import EngineOptions, plan_decoding
from stagdist.errors import ConfigError
from tests.decode.decoding import Case, config_of, parameters_of, prompt, run_cases
from tests.reference import stagformer as reference

SHARED: dict[str, Any] = {"section_layers": [2, 2], "share_section_weights": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "stagger 1": SHARED,
    "stagger 2": SHARED | {"stagger": 2},
    "window": SHARED | {"cross_attention_window": 3},
    "stagger 2, window, tied, grouped": SHARED
    | {
        "stagger": 2,
        "cross_attention_window": 2,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "cross_attention_key_value_heads": 1,
    },
}
LENGTHS = (1, 2, 4, 6, 13)
NEW_TOKENS = 9


def recurrence(
    parameters: reference.Parameters, config: dict[str, Any], prompt_ids: Sequence[int], tokens: Sequence[int]
) -> torch.Tensor:
    """Logits of which tokens after a prompt were chosen, everything computed again for every token.

    Memory slots of the prompt come from section 1; each decoded position gives its own output of section 2.
    """
    shape = reference.shape_of(config)
    embeddings = parameters["embedding.weight"][torch.tensor([[*prompt_ids, *tokens]])]
    length = len(prompt_ids)
    source = reference.run_section(parameters, shape, 0, embeddings[:, :length], None)  # what the memory is made from
    outputs = [reference.run_section(parameters, shape, 1, embeddings[:, :length], source)[:, -1:]]
    for end in range(length + 1, length + len(tokens)):
        # The shift takes the newest entry away from every position that it could reach: any value will do.
        unseen = torch.full_like(source[:, :1], 1e3)
        output = reference.run_section(parameters, shape, 1, embeddings[:, :end], torch.cat([source, unseen], dim=1))
        outputs.append(output[:, -1:])
        source = torch.cat([source, output[:, -1:]], dim=1)
    return reference.logits_of(parameters, config, [torch.cat(outputs, dim=1)])[0]


def recurrences(case: Case, completions: Sequence[RequestOutput]) -> list[torch.Tensor]:
    """Logits of every answer."""
    parameters, config = parameters_of(case), config_of(case.keys)
    pairs = zip(case.requests, completions, strict=True)
    return [recurrence(parameters, config, request.prompt_ids, done.token_ids) for request, done in pairs]


def case_of(keys: dict[str, Any], num_slots: int, *, recurrent: bool = True, precision: str = "fp64") -> Case:
    requests = [
        Request(str(length), prompt(length), SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0))
        for length in LENGTHS
    ]
    options = EngineOptions(recurrent=recurrent, precision=precision, num_slots=num_slots, chunk_size=5)
    return Case("recurrent", keys, requests, options)


@pytest.mark.parametrize("num_slots", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 5))])
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_are_those_of_the_plain_loop(name: str, num_slots: int) -> None:
    case = case_of(VARIANTS[name], num_slots)
    (ran,) = run_cases([case])
    for done, logits in zip(ran.completions, recurrences(case, ran.completions), strict=True):
        assert list(done.token_ids) == logits.argmax(-1).tolist() and len(done.token_ids) == NEW_TOKENS


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-4)])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_plain_loop(name: str, precision: str, tolerance: float) -> None:
    case = case_of(VARIANTS[name], 1, precision=precision)
    (ran,) = run_cases([case])
    found = torch.cat([logits for _, _, logits in ran.logits]).double()
    torch.testing.assert_close(found, torch.cat(recurrences(case, ran.completions)), atol=tolerance, rtol=0)


def test_the_loop_is_not_ordinary_decoding() -> None:
    case = case_of(SHARED, 1)
    recurrent, ordinary = run_cases([case, case_of(SHARED, 1, recurrent=False)])
    for place, why in ((0, "the prompt is the same in both"), (1, "the first step still looks at the prompt")):
        assert torch.allclose(recurrent.logits[place][2], ordinary.logits[place][2]), why
    pairs = zip(recurrent.logits[2:NEW_TOKENS], ordinary.logits[2:NEW_TOKENS], strict=True)
    assert all((one[2] - other[2]).abs().max() > 1e-3 for one, other in pairs)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "own weights": ({"section_layers": [2, 2]}, 1, "do not share weights"),
    "three sections": (SHARED | {"section_layers": [1, 1, 1]}, 1, "3 sections, not 2"),
    "combined": (SHARED | {"combine_sections": True}, 1, "outputs are combined"),
    "stagger 0": (SHARED | {"stagger": 0}, 1, "stagger is 0"),
    "two stages": (SHARED, 2, "2 stages, not 1"),
    "sequential": ({"connection": "sequential"}, 1, "do not share weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_recurrence_is_refused_with_the_reason(name: str) -> None:
    keys, world, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=f"recurrent decoding is defined for two sections.*{reason}"):
        plan_decoding(ModelConfig(**config_of(keys)), EngineOptions(recurrent=True), world)
