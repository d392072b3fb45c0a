"""Prompts of the command line, of text files and of JSON lines; each error names its place and harms no other."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from stagdist.data.tokenizer import Tokenizer, byte_tokenizer
from stagdist.decode.frontend.prompts import (
    Prompt,
    check_prompts_file,
    make_request,
    prompts_from_arguments,
    prompts_from_file,
    prompts_from_jsonl,
    prompts_from_lines,
)
from stagdist.decode.request import MAX_INT64, SamplingParams
from stagdist.errors import ConfigError

DEFAULTS = SamplingParams(max_new_tokens=7, temperature=0.5, seed=10)


def error_of(prompt: Prompt, defaults: SamplingParams = DEFAULTS) -> str:
    """Why a prompt makes no request."""
    with pytest.raises(ConfigError) as caught:
        make_request(prompt, defaults, byte_tokenizer())
    return str(caught.value)


def from_json(body: object) -> Prompt:
    """The prompt of one line."""
    (prompt,) = prompts_from_jsonl([json.dumps(body).encode()], "file.jsonl")
    return prompt


def test_arguments_become_requests_with_seeds_of_their_own() -> None:
    requests = [make_request(prompt, DEFAULTS, byte_tokenizer()) for prompt in prompts_from_arguments(["a", "", "é"])]
    assert [request.prompt_ids for request in requests] == [(97,), (), (0xC3, 0xA9)]
    assert [request.params.seed for request in requests] == [10, 11, 12]
    assert {request.params.max_new_tokens for request in requests} == {7}
    assert len({request.request_id for request in requests}) == 3


def test_lines_lose_their_ends_only_and_a_bad_one_stands_alone() -> None:
    lines = [b" one \n", b"two\r\n", b"\n", b"b\xffd\n", b"\xc3\xa9"]
    prompts = list(prompts_from_lines(lines, "standard input"))
    assert [prompt.text for prompt in prompts] == [" one ", "two", "", None, "é"]
    assert [prompt.index for prompt in prompts] == [0, 1, 2, 3, 4]
    assert error_of(prompts[3]).startswith("line 4 of standard input is not UTF-8: byte 0xff at position 1")


def test_a_line_is_given_before_the_next_one_is_read() -> None:
    read: list[bytes] = []

    def stream() -> Iterator[bytes]:
        for line in (b"one\n", b"two\n"):
            read.append(line)
            yield line

    assert next(prompts_from_lines(stream(), "x")).text == "one"
    assert read == [b"one\n"]


def test_json_lines_carry_ids_names_and_sampling() -> None:
    lines = [
        b'{"prompt": "a", "id": "mine", "temperature": 0, "stop": ["x"], "seed": 3}\n',
        b"\n",
        b'{"prompt_ids": [1, 2], "top_k": 4, "max_new_tokens": 1}\n',
    ]
    first, second = prompts_from_jsonl(lines, "file.jsonl")
    assert (first.name, second.name, second.index, second.place) == ("mine", 1, 1, "line 3 of file.jsonl")
    one, two = (make_request(prompt, DEFAULTS, byte_tokenizer()) for prompt in (first, second))
    assert one.params == SamplingParams(max_new_tokens=7, temperature=0, stop=("x",), seed=3)
    assert two.prompt_ids == (1, 2)
    assert two.params == SamplingParams(max_new_tokens=1, temperature=0.5, top_k=4, seed=11)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ([1], "is no JSON object"),
        ({}, "has no prompt; give one of the keys prompt, prompt_ids, messages"),
        ({"prompt": "a", "prompt_ids": [1]}, "has prompt and prompt_ids; give one of"),
        ({"prompt": 3}, "prompt is 3; give text"),
        ({"prompt_ids": "abc"}, "prompt_ids is 'abc'; give a list"),
        ({"prompt": "a", "id": [1]}, "id is [1]"),
        ({"prompt": "a", "max_tokens": 3}, "did you mean 'max_new_tokens'?"),
        ({"prompt": "a", "zzzzzz": 3}, "known are prompt, prompt_ids, messages, id"),
        ({"prompt": "a", "top_p": 0}, "top_p is 0"),
        ({"prompt": "a", "stop": "x"}, "stop is 'x'; give a list"),
        ({"prompt": "half \ud800"}, "not UTF-8 text, see position 5"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "not UTF-8 text"),
        ({"messages": []}, "messages must be a list of objects"),
        ({"messages": [{"content": "a"}]}, "messages must be a list of objects"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no chat template"),
    ],
)
def test_a_bad_object_says_what_is_wrong_and_where(body: object, complaint: str) -> None:
    message = error_of(from_json(body))
    assert message.startswith("line 1 of file.jsonl") and complaint in message


def test_a_broken_or_very_deep_line_is_no_json() -> None:
    for line in (b'{"prompt": ', b"[" * 100_000):
        (prompt,) = prompts_from_jsonl([line], "file.jsonl")
        assert "line 1 of file.jsonl is not JSON" in error_of(prompt)


def test_bytes_of_the_command_line_that_are_not_utf8_are_named() -> None:
    (prompt,) = prompts_from_arguments([b"caf\xe9".decode("utf-8", "surrogateescape")])
    assert error_of(prompt).startswith("--prompt number 1 is not UTF-8 text, see position 3")


def test_a_text_without_tokens_is_an_error_of_that_prompt() -> None:
    unknown = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"b": 0})).to_str(), None)
    first, second = prompts_from_arguments(["b", "a"])
    assert make_request(first, SamplingParams(), unknown).prompt_ids == (0,)
    with pytest.raises(ConfigError, match="^--prompt number 2: the tokenizer cannot encode the text"):
        make_request(second, SamplingParams(), unknown)


def test_a_seed_that_grows_past_the_largest_one_is_an_error_of_that_prompt() -> None:
    first, second = prompts_from_arguments(["a", "b"])
    defaults = SamplingParams(seed=MAX_INT64)
    assert make_request(first, defaults, byte_tokenizer()).params.seed == MAX_INT64
    assert "--prompt number 2: seed is" in error_of(second, defaults)


def test_the_ending_of_a_file_decides_how_it_is_read(tmp_path: Path) -> None:
    line = '{"prompt": "a"}\n'
    for name, text in (("a.txt", line.strip()), ("a.jsonl", "a")):
        (tmp_path / name).write_text(line)
        check_prompts_file(tmp_path / name)
        assert [prompt.text for prompt in prompts_from_file(tmp_path / name)] == [text]
    for name, complaint in (("a.csv", "a .txt or a .jsonl file"), ("b.txt", "No such file"), ("c.txt", "directory")):
        (tmp_path / "c.txt").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=complaint):
            check_prompts_file(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    mark, line = b"\xef\xbb\xbf", b'{"prompt": "def"}'
    assert [prompt.text for prompt in prompts_from_lines([mark + b"def\n", mark + b"x"], "a.txt")] == ["def", "\ufeffx"]
    (prompt,) = prompts_from_jsonl([mark + line], "file.jsonl")
    assert (prompt.text, prompt.error) == ("def", None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 3}, {"prompt": [1] * 1000}, {"prompt_ids": [1]}, {"messages": 3},
        {"id": 1.5}, {"id": None}, {"id": True}, {"id": ["a"]}, {"id": {}}, {"id": "half \ud800"},
    ],
)  # fmt: skip
def test_the_answer_to_a_bad_request_has_the_id_that_came(wrong: dict[str, object]) -> None:
    given = {"id": "row-17", "prompt": "a"} | wrong
    prompt = from_json(given)
    assert prompt.name == given["id"] and prompt.error is not None and len(prompt.error) < 200
