"""Mutated requests to the HTTP process: the right answer or OpenAI's error object, and never a traceback."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from stagdist.data.tokenizer import byte_tokenizer
from tests.fuzz.mutations import mutations
from tests.serving.scripted_engine import LIMIT_S, HttpServer, serving

SAMPLING = {
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "logit_bias": {"97": -1.5}, "seed": 7, "stop": ["é", "\n"],
    "stop_token_ids": [3], "stream": False, "return_token_ids": True,
}  # fmt: skip
MESSAGES = [{"role": "system", "content": [{"type": "text", "text": "日本"}]}, {"role": "user", "content": "a"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "tiny", "prompt": "Grüße 🙂", "echo": True, "logprobs": 2, "n": 2, **SAMPLING}),
    ("/v1/completions", {"prompt": ["ab", [99, 100]], "add_special_tokens": False, "parse_special": True, **SAMPLING}),
    ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, **SAMPLING, "stream": True}),
    ("/tokenize", {"prompt": "Grüße 🙂<|endoftext|>", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}),
    ("/detokenize", {"tokens": [71, 114, 195, 188, 256], "model": "tiny"}),
]
HEAD = (
    "POST /v1/completions?a=%41 HTTP/1.1\r\nHost: a.example\r\nAuthorization: Bearer k\r\nX-Request-Id: fuzz-1\r\n"
    "Content-Type: application/json\r\nContent-Length: 29\r\nConnection: close\r\n\r\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """It has to survive all tests without a traceback."""
    with serving(tmp_path_factory.mktemp("http")) as running:
        yield running
        assert running.process.poll() is None and "Traceback" not in running.log.read_text()


def prompts(said: dict[str, Any], *, parse_special: bool) -> list[list[int]]:
    """The token ids that a body asks for."""
    if "messages" in said:
        texts = [f"<{each['role']}>{content(each.get('content') or '')}" for each in said["messages"]]
        given: Any = "".join(texts) + "<assistant>" * said.get("add_generation_prompt", True)
        parse_special = True
    else:
        given = said.get("prompt", said.get("content"))
        parse_special = said.get("parse_special", parse_special)
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    encode = byte_tokenizer().encode_prompt
    return [encode(one, parse_special=parse_special) if isinstance(one, str) else one for one in several]


def content(given: Any) -> str:
    return given if isinstance(given, str) else "\n".join(part["text"] for part in given)


def assert_right(path: str, body: bytes, answer: httpx.Response, submitted: list[dict[str, Any]]) -> None:
    """The answer has what the body asks for, and so has the engine."""
    said = json.loads(body.decode("utf-8-sig"))
    if path == "/detokenize":
        assert answer.json()["prompt"] == byte_tokenizer().decode(said["tokens"], skip_special_tokens=False)
    elif path == "/tokenize":
        assert [answer.json()["tokens"]] == prompts(said, parse_special=True)
    else:
        n = said.get("n") or 1
        assert [each["prompt"] for each in submitted[::n]] == prompts(said, parse_special=False)
        for each in submitted:
            assert each["params"].get("temperature", 1.0) == said.get("temperature", 1.0)
            assert dict(each["params"].get("logit_bias", ())) == {
                int(token): bias for token, bias in said.get("logit_bias", {}).items()
            }
        assert "choices" in answer.text and '"error"' not in answer.text


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[f"{n} {path}" for n, (path, _) in enumerate(BODIES)])
def test_a_mutated_body_is_answered_or_refused(path: str, body: dict[str, Any], server: HttpServer) -> None:
    valid = json.dumps(body, ensure_ascii=False).encode()
    headers, refused = {"x-request-id": "fuzz-1", "content-type": "application/json"}, 0
    with server.client(headers=headers) as http:
        for mutation in mutations(valid, others=[json.dumps(other).encode() for _, other in BODIES]):
            server.engine.submitted.clear()
            answer = http.post(path, content=mutation.content)
            assert answer.headers["x-request-id"] == "fuzz-1"
            if answer.status_code == 200:
                assert_right(path, mutation.content, answer, server.engine.submitted)
                continue
            refused += 1
            error = answer.json()["error"]
            assert 400 <= answer.status_code < 500, (mutation.name, error)
            assert set(error) == {"message", "type", "param", "code"}, mutation.name
            assert error["message"] and "\n" not in error["message"], mutation.name
    assert refused


def test_a_mutated_head_is_answered_or_refused(server: HttpServer) -> None:
    for mutation in mutations(HEAD.encode()):
        with socket.create_connection(("127.0.0.1", server.settings.port), LIMIT_S) as connection:
            connection.sendall(mutation.content + b'{"prompt":"a","max_tokens":1}')
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        assert answer[:10] in (b"", b"HTTP/1.1 2", b"HTTP/1.1 4"), mutation.name
