"""Completions over HTTP: the shapes that the openai package, lm-evaluation-harness and others read."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from tests.serving.scripted_engine import CONTEXT, HttpServer, events


@pytest.fixture(scope="module")
def client(server: HttpServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(http: httpx.Client, **body: Any) -> Any:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["type"] == "BadRequestError"
    return dict(error)


def test_the_openai_package_completes_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hi", max_tokens=4)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abcd", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 4, 6)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_the_openai_package_streams(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        client.completions.create(model="tiny", prompt="Hi", max_tokens=3, stream=True, stream_options=options)
    )
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["a", "b", "c"], "one chunk for each token"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_the_asynchronous_openai_package_completes_in_parallel(server: HttpServer) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            requests = [client.completions.create(model="tiny", prompt="x", max_tokens=count) for count in range(1, 9)]
            return [answer.choices[0].text for answer in await asyncio.gather(*requests)]

    assert asyncio.run(run()) == ["abcdefghij"[:count] for count in range(1, 9)]


def test_no_usage_chunk_comes_unasked(http: httpx.Client) -> None:
    chunks = events(http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}).text)
    assert chunks[-1] == "[DONE]"
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks[:-1])


def test_usage_in_every_chunk_on_demand(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "xy", "max_tokens": 2, "stream": True, "stream_options": options}
    chunks = events(http.post("/v1/completions", json=body).text)
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks[:-1])
    assert chunks[-2]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("prompt", "encoded"),
    [
        ("Hi", [[72, 105]]),
        (["Hi", "é"], [[72, 105], [195, 169]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["A", [66]], [[65], [66]]),
        ("<|endoftext|>x", [[*b"<|endoftext|>x"]]),
    ],
)
def test_all_forms_of_a_prompt(server: HttpServer, http: httpx.Client, prompt: Any, encoded: list[list[int]]) -> None:
    before = len(server.engine.submitted)
    answer = post(http, prompt=prompt, max_tokens=1)
    assert [request["prompt"] for request in server.engine.submitted[before:]] == encoded
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(encoded)))


def test_special_tokens_in_a_text_on_demand(server: HttpServer, http: httpx.Client) -> None:
    post(http, prompt="a<|endoftext|>", max_tokens=1, parse_special=True)
    assert server.engine.submitted[-1]["prompt"] == [97, 256]


def test_lm_evaluation_harness_scores_a_prompt(http: httpx.Client) -> None:
    """The request of `local-completions`, and how it reads the answer."""
    context, continuation = [10, 20, 31], [40, 51]
    body = {"prompt": [context + continuation], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    (choice,) = post(http, **body, echo=True)["choices"]
    tokens, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    assert len(tokens) == len(top) == len(choice["logprobs"]["tokens"]) == len(context) + len(continuation) + 1
    assert tokens[0] is None
    assert top[0] is None
    scores = tokens[len(context) : -1]
    assert scores == [-0.5, -2.5]
    greedy = [score == max(entry.values()) for score, entry in zip(scores, top[len(context) : -1], strict=True)]
    assert greedy == [True, False]


def test_a_prompt_is_scored_alone(server: HttpServer, http: httpx.Client) -> None:
    answer = post(http, prompt="Hey", max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]) == ("Hey", ["H", "e", "y"], "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert server.engine.submitted[-1]["params"]["max_new_tokens"] == 0
    assert refusal(http, prompt="Hey", max_tokens=0)["param"] == "max_tokens"


def test_echo_of_a_stream_comes_with_the_first_token(http: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 2, "stream": True, "echo": True, "logprobs": 0, "return_token_ids": True}
    chunks = events(http.post("/v1/completions", json=body).text)[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Hia", "b"]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [["H", "i", "a"], ["b"]]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2], [3]]
    assert [choice["token_ids"] for choice in choices] == [[97], [98]]
    assert choices[0]["prompt_token_ids"] == [72, 105]
    assert "prompt_token_ids" not in choices[1]


def test_the_chosen_token_is_among_the_top(http: httpx.Client) -> None:
    (choice,) = post(http, prompt="x", max_tokens=2, logprobs=2)["choices"]
    for name, own, top in zip(
        *(choice["logprobs"][key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[name] == own
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [3, 2]


def test_choices_are_numbered_by_prompt(server: HttpServer, http: httpx.Client) -> None:
    before = len(server.engine.submitted)
    answer = post(http, prompt=["A", "B"], n=3, max_tokens=1, seed=7)
    requests = server.engine.submitted[before:]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [request["id"] for request in requests] == [f"{answer['id']}/{index}" for index in range(6)]
    assert [request["prompt"] for request in requests] == [[65]] * 3 + [[66]] * 3
    assert [request["params"]["seed"] for request in requests] == [7, 8, 9] * 2
    assert answer["seed"] == 7
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 6


def test_requests_without_a_seed_draw_one_and_say_it(server: HttpServer, http: httpx.Client) -> None:
    answers = [post(http, prompt="x", max_tokens=1) for _ in range(2)]
    seeds = [answer["seed"] for answer in answers]
    assert seeds[0] != seeds[1]
    assert [request["params"]["seed"] for request in server.engine.submitted[-2:]] == seeds
    assert answers[0]["system_fingerprint"] == answers[1]["system_fingerprint"]
    post(http, prompt="x", max_tokens=1, seed=-1)
    assert server.engine.submitted[-1]["params"]["seed"] == 2**63 - 1


def test_sampling_fields_reach_the_engine_by_its_names(server: HttpServer, http: httpx.Client) -> None:
    post(
        http,
        prompt="x",
        max_tokens=9,
        temperature=0,
        top_k=-1,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=0.25,
        logit_bias={"65": -100},
        stop=["", "END"],
        stop_token_ids=[3],
        include_stop_str_in_output=True,
        ignore_eos=True,
        min_tokens=2,
        skip_special_tokens=False,
        allowed_token_ids=[65, 66],
        seed=1,
        deadline_s=5,
        user="someone",
        an_unknown_field=1,
    )
    request = server.engine.submitted[-1]
    assert request["deadline_s"] == 5
    assert request["params"] == {
        "max_new_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.25,
        "logit_bias": [[65, -100.0]],
        "stop": ["END"],
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_end_of_document": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "allowed_token_ids": [65, 66],
        "seed": 1,
    }


@pytest.mark.parametrize(("given", "expected"), [({}, 16), ({"max_tokens": None}, 16), ({"max_tokens": 999}, CONTEXT)])
def test_the_maximum_of_tokens(server: HttpServer, http: httpx.Client, given: dict[str, Any], expected: int) -> None:
    assert post(http, prompt="x", **given)["usage"]["completion_tokens"] == expected
    assert server.engine.submitted[-1]["params"]["max_new_tokens"] == (given.get("max_tokens") or expected)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({}, "prompt", "required"),
        ({"prompt": None}, "prompt", "text"),
        ({"prompt": [1.5]}, "prompt", "text"),
        ({"prompt": [True]}, "prompt", "text"),
        ({"prompt": [["a"]]}, "prompt", "token ids"),
        ({"prompt": [257]}, "prompt", "outside of the vocabulary of 257"),
        ({"prompt": [-1]}, "prompt", "outside"),
        ({"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "number"),
        ({"prompt": "x", "top_p": 0}, "top_p", "top_p is 0"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "x", "max_tokens": 2, "min_tokens": 3}, "min_tokens", "max_tokens (2)"),
        ({"prompt": "x", "n": 0}, "n", "greater"),
        ({"prompt": "x", "n": 129}, "n", "128"),
        ({"prompt": ["x"] * 200, "n": 2}, "n", "400 choices"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "20"),
        ({"prompt": "x", "stop": ["a"] * 65}, "stop", "64"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias", "vocabulary"),
        ({"prompt": "x", "logit_bias": {**dict.fromkeys(map(str, range(200)), 1), "a": 1}}, "logit_bias", "token ids"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty", "-2 to 2"),
        ({"prompt": "x", "best_of": 2}, "best_of", "not supported"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"prompt": "x", "prompt_logprobs": 1}, "prompt_logprobs", "echo"),
        ({"prompt": "x", "tool_choice": "required"}, "tool_choice", "not supported"),
        ({"prompt": "x", "regex": "a+"}, "regex", "not supported"),
        ({"prompt": "x", "deadline_s": 0}, "deadline_s", "greater than 0"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(http, **fields)
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1, "suffix": "", "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
        {"best_of": None, "suffix": None, "logprobs": None, "stop": None, "stream_options": None, "stream": False},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(http: httpx.Client, fields: dict[str, Any]) -> None:
    post(http, prompt="x", max_tokens=1, **fields)


def test_a_long_prompt_has_the_code_that_clients_know(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[1] * (CONTEXT + 3))
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 200" in caught.value.message
    assert "at least 3" in caught.value.message


def test_a_prompt_that_fills_the_context_gets_one_token(http: httpx.Client) -> None:
    assert post(http, prompt=[1] * CONTEXT, max_tokens=5)["usage"]["completion_tokens"] == 1


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="x")
    assert caught.value.param == "model"
    assert client.completions.create(model="alias", prompt="x").model == "alias"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"prompt": NaN}', b'{"prompt": "\\ud800"}'],
)
def test_a_body_that_is_no_object_is_refused(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
