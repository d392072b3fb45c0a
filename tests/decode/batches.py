"""Requests of every kind that are served together, in several arrangements."""

from collections.abc import Iterable
from typing import Any

from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions
from stagdist.decode.topology import HeadLayout
from tests.decode.decoding import Case, prompt

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"section_layers": [2, 2], "share_section_weights": True},
    "stagger 2": {"stagger": 2},
    "window": {"cross_attention_window": 3},
    "combined": {"combine_sections": True, "tie_word_embeddings": True},
    "shared, stagger 2, window, combined": {
        "share_section_weights": True,
        "stagger": 2,
        "cross_attention_window": 2,
        "combine_sections": True,
    },
    "stagger 0": {"stagger": 0},
    "sequential": {"connection": "sequential"},
}
ENDING = tuple(range(0, 36, 3))
"""Stop ids that end most requests early."""


def request(name: str, length: int, count: int, **params: Any) -> Request:
    """A request; a seed without temperature has no effect."""
    return Request(
        name, prompt(length, seed=7), SamplingParams(**{"max_new_tokens": count, "temperature": 0.0} | params)
    )


REQUESTS = [
    request("greedy", 6, 9),
    request("sampled", 1, 12, temperature=0.8, seed=3),
    request("one token", 11, 1, logprobs=0),
    request("top k", 13, 8, temperature=1.3, top_k=5, seed=2**62 + 1),
    request("stops", 4, 12, stop_token_ids=ENDING, logprobs=3),
    request("top p", 5, 7, temperature=1.0, top_p=0.8, seed=11, stop_token_ids=ENDING),
    request("penalty", 9, 10, repetition_penalty=1.7),
    request("min p", 2, 11, temperature=0.7, min_p=0.1, repetition_penalty=1.2, seed=5),
    request("whole context", 17, 100, temperature=1.5, seed=3, logprobs=5),
    request("sampled, stops", 3, 12, temperature=1.0, seed=4, stop_token_ids=ENDING[:3]),
    request(
        "changed",
        7,
        12,
        temperature=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.7,
        logit_bias=((5, 1.5), (30, -2.0)),
        allowed_token_ids=tuple(range(2, 36)),
        min_tokens=6,
        stop_token_ids=ENDING,
        seed=8,
    ),
]
"""Prompts of different lengths, choices of every kind; some end early, one goes on to the end of the context."""


def arrangement(
    variant: str,
    requests: Iterable[Request],
    num_slots: int,
    *,
    tensor: int = 1,
    head: HeadLayout = "last",
    precision: str = "fp64",
) -> Case:
    """Requests served in so many slots."""
    options = EngineOptions(
        tensor, head, num_slots=num_slots, chunk_size=5, precision=precision, want_margins=precision == "fp32"
    )
    # With these weights the margins of all variants are clear.
    return Case(variant, VARIANTS[variant], list(requests), options, seed=4)


def by_name(case: Case, completions: list[Any]) -> dict[str, Any]:
    """Completions by request."""
    return {request.request_id: done for request, done in zip(case.requests, completions, strict=True)}
