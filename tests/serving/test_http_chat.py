"""Chat completions over HTTP: templates, parts, streams and log-probabilities."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving.scripted_engine import CONTEXT, HttpServer, hello, serving

MESSAGES = [{"role": "user", "content": "Hi"}]


def prompt_text(server: HttpServer) -> str:
    return bytes(server.engine.submitted[-1]["prompt"]).decode()


def test_the_openai_package_chats(server: HttpServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=3)
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abc", "length")
    assert prompt_text(server) == "<system>Be brief.<user>Hi<assistant>"
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert [delta.role for delta in deltas] == ["assistant", None, None]
    assert [delta.content for delta in deltas] == ["", "a", "b"]


def test_parts_of_a_message_are_joined(server: HttpServer, http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = {"messages": [{"role": "developer", "content": parts}], "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert prompt_text(server) == "<system>one\ntwo<assistant>"


def test_the_larger_field_of_two_maxima_wins(server: HttpServer, http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 2}
    assert http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 2
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES}).json()
    length = len("<user>Hi<assistant>")
    assert answer["usage"]["completion_tokens"] == CONTEXT - length + 1, "a chat without a maximum fills the context"


def test_log_probabilities_have_bytes(server: HttpServer, http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "n": 2}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    first = answer["choices"][1]["logprobs"]["content"][1]
    assert (first["token"], first["logprob"], first["bytes"]) == ("b", -0.5, [98])
    assert first["top_logprobs"][0] == {"token": "b", "logprob": -0.5, "bytes": [98]}
    body = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True}
    (entry,) = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        ({"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "prompt"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/chat/completions", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_base_model_refuses_conversations(tmp_path: Path) -> None:
    with serving(tmp_path, first=hello(chat_template=None)) as server, server.client() as http:
        answer = http.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "no_chat_template"
        assert "/v1/completions" in error["message"]
        assert "--chat-template" in error["message"]
        assert http.get("/tokenizer_info").json()["chat_template"] is None


def test_plain_names_the_speakers_and_ends_before_the_next(tmp_path: Path) -> None:
    with serving(tmp_path, chat_template="plain") as server, server.client() as http:
        messages = [*MESSAGES, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
        body = {"messages": messages, "max_tokens": 1, "stop": "END"}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert prompt_text(server) == "User: Hi\nAssistant: Ho\nUser: ?\nAssistant:"
        assert server.engine.submitted[-1]["params"]["stop"] == ["END", "\nUser:"]


def test_the_template_of_the_server_replaces_the_model_s(tmp_path: Path) -> None:
    template = (
        "{% if mood is defined %}[{{ mood }}]{% endif %}{% for message in messages %}{% generation %}"
        "{% if message.content == 'bad' %}{{ raise_exception('no ' + message.content) }}{% endif %}"
        "{{ message.content | tojson }}{% endgeneration %}{% endfor %}"
    )
    with serving(tmp_path, chat_template=template) as server, server.client() as http:
        body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"mood": "<fine>"}}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert prompt_text(server) == '[<fine>]"Hi"'
        body = {"messages": [{"role": "user", "content": "bad"}]}
        answer = http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "refuses the messages: no bad" in answer.json()["error"]["message"]


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with serving(tmp_path, chat_template=template) as server, server.client() as http:
        answer = http.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert answer.status_code == 400
        assert "unsafe" in answer.json()["error"]["message"]
