"""Requests: what is refused, and with which words."""

from typing import Any

import pytest

from stagdist.decode.request import (
    MAX_INT64,
    MAX_LOGPROBS,
    FinishReason,
    Request,
    SamplingParams,
    allowed_new_tokens,
    check_request,
)
from stagdist.errors import ConfigError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 1.0, True, None, "5", 10**30]),
        ("temperature", [-0.1, 1e-7, NAN, INF, True, None, "1", 10**400]),
        ("top_k", [0, -1, 2.0, True, "5", 10**400]),
        ("top_p", [0, -0.5, 1.01, NAN, INF, False, None]),
        ("min_p", [-0.1, 1.01, NAN, True, None]),
        ("repetition_penalty", [0, -1, NAN, INF, 1e-9, 1e9, True, None]),
        ("seed", [-1, MAX_INT64 + 1, 1.0, True, None]),
        ("stop", ["end", [""], [1], None, ["a", ""], [b"a"]]),
        ("stop_token_ids", [5, [-1], [True], [1.0], None, "12"]),
        ("ignore_end_of_document", [1, None, "yes"]),
        ("logprobs", [-1, MAX_LOGPROBS + 1, True, 1.0]),
        ("prompt_logprobs", [-1, MAX_LOGPROBS + 1, True, 1.0]),
        ("presence_penalty", [-2.01, 2.01, NAN, True, None, "1"]),
        ("frequency_penalty", [-2.01, 2.01, NAN, True, None, "1"]),
        ("min_tokens", [-1, 129, 1.0, True, None]),
        ("allowed_token_ids", [(), 5, (-1,), (True,), (1.0,), "12"]),
        ("include_stop_str_in_output", [1, None, "yes"]),
        ("skip_special_tokens", [0, None, "no"]),
        ("logit_bias", [5, "12", None, (5,), ((1,),), ((1, 2, 3),), ((-1, 0),), ((True, 0),), ((1.0, 0),)]),
        ("logit_bias", [{"a": 1}, {"-1": 1}, {1: 1, "1": 2}]),
        ("logit_bias of token 3", [100.1, -101, NAN, "2", None, True]),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as refused:
            SamplingParams(**({name: value} if " of " not in name else {"logit_bias": ((3, value),)}))
        assert str(refused.value).startswith(f"{name} is {value!r}; give ")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [1, MAX_INT64]),
        ("temperature", [0, 0.0, 1e-6, 5]),
        ("top_k", [1, 10**6, None]),
        ("top_p", [1, 1e-9]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [1e-6, 1, 1e6]),
        ("seed", [0, MAX_INT64]),
        ("stop", [(), ("a", "b")]),
        ("stop_token_ids", [(), (0, 7)]),
        ("logprobs", [None, 0, MAX_LOGPROBS]),
        ("prompt_logprobs", [None, 0, MAX_LOGPROBS]),
        ("presence_penalty", [-2, 0, 2.0]),
        ("frequency_penalty", [-2, 0, 2.0]),
        ("min_tokens", [0, 128]),
        ("allowed_token_ids", [None, (0,), (7, 7)]),
        ("logit_bias", [(), ((3, 100), (0, -100.0))]),
    ],
)
def test_values_at_the_limits_are_kept(name: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_lists_become_tuples() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[3])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("a",), (3,))
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(3,)))


def test_biases_may_be_an_object_of_json() -> None:
    given: list[Any] = [{"7": 1, "0": -2.5}, {7: 1.0, 0: -2.5}, [[7, 1], [0, -2.5]]]
    assert {SamplingParams(logit_bias=bias).logit_bias for bias in given} == {((7, 1.0), (0, -2.5))}


def test_no_new_token_is_asked_for_only_to_score_a_prompt() -> None:
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=0).max_new_tokens == 0
    with pytest.raises(ConfigError, match="max_new_tokens is 0; give an integer from 1 .*prompt_logprobs"):
        SamplingParams(max_new_tokens=0)
    with pytest.raises(ConfigError, match="max_new_tokens is -1"):
        SamplingParams(max_new_tokens=-1, prompt_logprobs=0)


def test_a_prompt_may_fill_the_context_and_still_get_one_token() -> None:
    params = SamplingParams(max_new_tokens=5)
    for length, allowed in ((1, 5), (6, 5), (7, 4), (10, 1)):
        request = Request("r", tuple(range(length)), params)
        check_request(request, vocab_size=10, max_context=10)
        assert allowed_new_tokens(request, 10) == allowed


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ((), "request 'r7': the prompt is empty"),
        (tuple(range(11)), "the prompt has 11 tokens and the model's context is 10; shorten it by at least 1"),
        ((1, 2, 10), "the prompt holds the id 10 at position 2, outside of the vocabulary of 10"),
        ((1, -1), "the prompt holds the id -1 at position 1, outside of the vocabulary of 10"),
        ((1, True), "the prompt holds True (bool) at position 1"),
        ((1.0,), "the prompt holds 1.0 (float) at position 0"),
        (("a",), "the prompt holds 'a' (str) at position 0"),
        ((None,), "the prompt holds None (NoneType) at position 0"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(prompt: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_request(Request("r7", prompt), vocab_size=10, max_context=10)
    assert problem in str(refused.value)


def test_stop_ids_outside_of_the_vocabulary_are_refused() -> None:
    request = Request("r", (1,), SamplingParams(stop_token_ids=(3, 99)))
    with pytest.raises(ConfigError, match="stop_token_ids holds the id 99 at position 1"):
        check_request(request, vocab_size=10, max_context=10)


def test_other_ids_outside_of_the_vocabulary_are_refused() -> None:
    given: dict[str, Any] = {"allowed_token_ids": (3, 10), "logit_bias": ((3, 1.0), (10, 1.0))}
    for name, value in given.items():
        request = Request("r", (1,), SamplingParams(**{name: value}))
        with pytest.raises(ConfigError, match=f"'r': {name} holds the id 10 at position 1"):
            check_request(request, vocab_size=10, max_context=10)


@pytest.mark.parametrize(("allowed", "stop", "fits"), [((3, 5), (5, 3), False), ((3, 5), (5,), True)])
def test_min_tokens_needs_a_token_that_does_not_end_the_output(
    allowed: tuple[int, ...], stop: tuple[int, ...], fits: bool
) -> None:
    for params in (
        SamplingParams(min_tokens=1, allowed_token_ids=allowed, stop_token_ids=stop),
        SamplingParams(min_tokens=1, stop_token_ids=tuple(range(9 if fits else 10))),
    ):
        request = Request("r", (1,), params)
        if fits:
            check_request(request, vocab_size=10, max_context=10)
            continue
        with pytest.raises(ConfigError, match="min_tokens is 1, but every allowed token ends the output"):
            check_request(request, vocab_size=10, max_context=10)


def test_finish_reasons_are_the_words_that_clients_know() -> None:
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "error", "cancelled", "timeout"]
