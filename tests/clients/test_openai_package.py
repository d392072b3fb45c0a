"""The `openai` package against a server of two ranks."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients.conftest import Served

PROMPT = "def main("


@pytest.fixture
def client_of(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_the_models_are_listed(client_of: OpenAI) -> None:
    (model,) = client_of.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "stagdist")
    extra = client_of.models.retrieve("tiny").model_extra
    assert extra is not None and extra["max_model_len"] == 256
    meta = extra["meta"]
    assert (meta["sections"], meta["stages"], meta["slots"], meta["stagger"], meta["chat"]) == (2, 2, 4, 1, True)


def test_a_completion_is_the_same_streamed_and_among_others(client_of: OpenAI, served: Served) -> None:
    asked: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 7}
    alone = client_of.completions.create(**asked)
    assert alone.usage is not None and alone.usage.completion_tokens <= 24
    assert alone.usage.prompt_tokens == len(PROMPT)
    chunks = list(client_of.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == alone.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == alone.usage.completion_tokens
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == alone.choices[0].finish_reason

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=60) as client:
            calls = [client.completions.create(**{**asked, "seed": seed}) for seed in range(10)]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    texts = asyncio.run(together())
    assert texts[7] == alone.choices[0].text
    assert len(set(texts)) == 10


def test_all_forms_of_a_prompt_and_several_choices(client_of: OpenAI) -> None:
    ids = list(client_of.with_options(base_url=str(client_of.base_url).removesuffix("/v1/")).post(
        "/tokenize", body={"prompt": PROMPT}, cast_to=dict[str, Any])["tokens"])  # fmt: skip
    forms: list[Any] = [PROMPT, [PROMPT], ids, [ids]]
    texts = {
        client_of.completions.create(model="tiny", prompt=form, max_tokens=8, temperature=0).choices[0].text
        for form in forms
    }
    assert len(texts) == 1
    many = client_of.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.usage is not None and many.usage.prompt_tokens == 2


def test_a_conversation_is_answered_and_streamed(client_of: OpenAI) -> None:
    asked: Any = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_completion_tokens": 12,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = client_of.chat.completions.create(**asked)
    message, logprobs = answer.choices[0].message, answer.choices[0].logprobs
    assert message.role == "assistant" and logprobs is not None and logprobs.content is not None
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)
    chunks = list(client_of.chat.completions.create(**asked, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", *[None] * (len(chunks) - 1)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content


def test_echo_scores_the_prompt(client_of: OpenAI) -> None:
    answer = client_of.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    scored = answer.choices[0].logprobs
    assert answer.choices[0].text == PROMPT and scored is not None
    assert scored.tokens == list(PROMPT) and scored.text_offset == list(range(len(PROMPT)))
    assert scored.token_logprobs is not None and scored.top_logprobs is not None
    assert scored.token_logprobs[0] is None and all(value < 0 for value in scored.token_logprobs[1:])
    for token, value, top in zip(scored.tokens[1:], scored.token_logprobs[1:], scored.top_logprobs[1:], strict=True):
        assert top[token] == value <= max(top.values())
        assert sum(map(math.exp, top.values())) < 1


def test_a_stop_string_ends_an_answer(client_of: OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 2}
    text = client_of.completions.create(**asked).choices[0].text
    stop = text[5:8]
    stopped = client_of.completions.create(**asked, stop=[stop]).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop" and stopped.model_extra["stop_reason"] == stop  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": "a" * 600}, 400, "prompt"),
        ({"prompt": [[1, 99_999]]}, 400, "prompt"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"top_p": 0}, 400, "top_p"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"best_of": 3}, 400, "best_of"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    client_of: OpenAI, change: dict[str, Any], status: int, param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client_of.completions.create(**{"model": "tiny", "prompt": "a", **change})
    assert caught.value.status_code == status
    assert isinstance(caught.value.body, dict) and caught.value.body["param"] == param
    assert len(caught.value.message) < 400


def test_a_stream_that_is_closed_frees_its_slot(client_of: OpenAI, served: Served) -> None:
    asked: Any = {"model": "tiny", "prompt": "a", "max_tokens": 240, "stream": True, "extra_body": {"ignore_eos": True}}
    for _ in range(8):  # more than slots
        with client_of.completions.create(**asked) as stream:
            next(iter(stream))
    after = client_of.completions.create(model="tiny", prompt="b", max_tokens=2)
    assert after.usage is not None and after.usage.completion_tokens <= 2
