"""Texts over HTTP: stops over token borders and half characters, the same in streams and in complete answers."""

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stagdist.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from stagdist.decode import text as text_module
from tests.launch.generating import write_model
from tests.launch.served_answers import ask
from tests.launch.serving import Served, serve
from tests.ranks import ROOT

pytestmark = pytest.mark.ranks

BROKEN = "\ufffd"
STOPS = 4
"""Sets of stop strings for each answer."""
LETTERS = tuple(b"ab ")
PARTS = {
    "a": (LETTERS, 0),
    "é": ((*"é".encode(), *LETTERS), 5),
    "€": (tuple("€".encode()), 3),
    "😘": (tuple(sorted(set("😘".encode()))), 8),
    BROKEN: (tuple(range(256)), 0),
}
"""By a character of the answer: the bytes of which it is made at random, and a seed that makes the character."""


def byte_cases(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Requests whose answers hold characters of every length, complete or not. One prompt ends in half a character."""
    shared = {"max_tokens": 50, "temperature": 1.0, "ignore_eos": True, "return_token_ids": True}
    cases = [
        {**shared, "prompt": tokenizer.encode("Say: "), "allowed_token_ids": allowed, "seed": seed}
        for allowed, seed in PARTS.values()
    ]
    first, second = "é".encode()
    half = {**shared, "prompt": [*tokenizer.encode("caf"), first], "allowed_token_ids": [first, second, *LETTERS]}
    return [*cases, {**half, "seed": 4, "logit_bias": {second: 3}}]


def word_cases(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Requests whose answers are random tokens of several letters, and one of special tokens too."""
    shared = {"max_tokens": 24, "temperature": 1.0, "ignore_eos": True, "return_token_ids": True}
    cases = [{**shared, "prompt": tokenizer.encode("Say: "), "seed": seed} for seed in range(3)]
    return [*cases, {**cases[0], "logit_bias": {tokenizer.end_of_document: 5}, "seed": 4}]


def expected_text(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of tokens behind a prompt, with what may become a character at its end."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def expected(
    tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stops: list[str], shown: bool
) -> dict[str, Any]:
    """Tokens, text, and why it ended, from the tokens of the answer without stops: searched anew after each token."""
    for count in range(1, len(tokens) + 1):
        text = expected_text(tokenizer, prompt, tokens[:count])
        found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
        if found:
            place, size, stop = min(found)
            end = place + size if shown else place
            return {"token_ids": tokens[:count], "text": text[:end], "finish_reason": "stop", "stop_reason": stop}
    text = expected_text(tokenizer, prompt, tokens).removesuffix(BROKEN)
    return {"token_ids": tokens, "text": text, "finish_reason": "length", "stop_reason": None}


def stop_sets(text: str, draw: random.Random) -> Iterator[list[str]]:
    """Lists of stop strings: pieces of a text, alone and with others, and one that never comes."""
    complete = [start for start in range(len(text)) if text[start] != BROKEN]
    for number in range(STOPS):
        start = draw.choice(complete)
        stop = text[start : start + draw.randrange(1, 7)].split(BROKEN)[0]
        others = [stop + "\n\n", stop[:-1] + "\0", text[start + 1 : start + 3].split(BROKEN)[0], "never"]
        stops = [stop] if number % 2 else draw.sample([stop, *others], 3)
        yield list(filter(None, stops))
    yield ["never"]


def rounded(choices: list[dict[str, Any]]) -> Any:
    """Choices without the last digits of log-probabilities, which depend on what else is decoded at the same time."""
    return json.loads(json.dumps(choices), parse_float=lambda digits: round(float(digits), 6))


def fields_of(answer: dict[str, Any], names: Any) -> dict[str, Any]:
    """What is compared of the first choice."""
    return {name: answer["choices"][0][name] for name in names}


def differences(served: Served, tokenizer: Tokenizer, cases: list[dict[str, Any]]) -> list[str]:
    """Streams and complete answers that are not what a plain search of the text gives."""

    def compare(job: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
        body, right = job
        answers = [ask(served, {**body, "stream": stream}) for stream in (False, True)]
        where = f"{body['prompt']}, stops {body.get('stop')}"
        found = [
            f"{where}: {fields_of(each, right)}, not {right}" for each in answers if fields_of(each, right) != right
        ]
        complete, streamed = (rounded(each["choices"]) for each in answers)
        return found + [f"{where}: the stream {streamed} is not {complete}"] * (complete != streamed)

    jobs, draw = [], random.Random(0)
    for case in cases:
        body = {"model": "m", "logprobs": 1, **case}
        tokens = ask(served, body)["choices"][0]["token_ids"]
        jobs.append((body, expected(tokenizer, body["prompt"], tokens, [], shown=False)))
        for stops in stop_sets(expected_text(tokenizer, body["prompt"], tokens), draw):
            shown = draw.random() < 0.3
            right = expected(tokenizer, body["prompt"], tokens, stops, shown)
            jobs.append(({**body, "stop": stops, "include_stop_str_in_output": shown}, right))
    with ThreadPoolExecutor(6) as pool:
        found = [line for lines in pool.map(compare, jobs) for line in lines]
    ends = [right["finish_reason"] for _, right in jobs]
    assert ends.count("stop") > len(jobs) / 2 and ends.count("length") > len(cases), "hardly a stop string was found"
    return found


def start(folder: Path, tokenizer: Tokenizer, *options: str, before: Callable[[], None] | None = None) -> Served:
    """Start a server of two ranks."""
    model = write_model(folder / "model", tokenizer, hidden_size=16, intermediate_size=24)
    fixed = ["--precision", "fp64", "--batch-size", "6", "--prefill-chunk", "16"]
    return serve(folder, model, *fixed, *options, before=before).wait_ready()


def test_stops_and_half_characters_are_the_same_in_streams_and_complete_answers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    served = start(tmp_path, tokenizer, "--chat-template", "plain")
    cases = byte_cases(tokenizer)
    texts = [ask(served, {"model": "m", **case})["choices"][0]["text"] for case in cases]
    assert all(char in text for char, text in zip(PARTS, texts, strict=False)), texts
    assert differences(served, tokenizer, cases) == []
    check_chat(served)
    check_choices(served, cases)


def check_chat(served: Served) -> None:
    """A conversation gets the answer that its tokens get as a prompt, in a stream too."""
    messages = [{"role": "user", "content": "Say é."}]
    shared = {"model": "m", "temperature": 0.9, "seed": 4, "max_tokens": 40, "return_token_ids": True}
    chats = [
        ask(served, {**shared, "messages": messages, "stream": stream}, "/v1/chat/completions")["choices"][0]
        for stream in (False, True)
    ]
    assert chats[0]["message"]["content"] == chats[1]["delta"]["content"]
    assert chats[0]["token_ids"] == chats[1]["token_ids"]
    ids = ask(served, {"messages": messages}, "/tokenize")["tokens"]
    same = ask(served, {**shared, "prompt": ids})["choices"][0]
    assert (same["text"], same["token_ids"]) == (chats[0]["message"]["content"], chats[0]["token_ids"])


def check_choices(served: Served, cases: list[dict[str, Any]]) -> None:
    """Choices of several prompts with an echo, whose chunks are mixed in a stream."""
    prompts = [case["prompt"] for case in cases[:2]]
    body = {"model": "m", **cases[1], "prompt": prompts, "n": 2, "echo": True, "logprobs": 2, "stop": ["ab", "é"]}
    complete, streamed = (rounded(ask(served, {**body, "stream": stream})["choices"]) for stream in (False, True))
    assert complete == streamed and len(complete) == 4
    assert all(len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"]) for choice in complete)


def test_stops_begin_and_end_inside_tokens_of_several_letters(tmp_path: Path) -> None:
    documents = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = train_bpe([*documents, "é € 😘 " * 100], 420)
    assert differences(start(tmp_path, tokenizer), tokenizer, word_cases(tokenizer)) == []


def leak_beginnings_of_stops() -> None:
    """Called on every rank: text is given before it is known whether it begins a stop string."""
    text_module._overlap = lambda text, stop: 0


@pytest.mark.slow  # says something about the test above only
def test_the_comparison_notices_texts_that_leak(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    served = start(tmp_path, tokenizer, before=leak_beginnings_of_stops)
    assert any("stops ['" in line for line in differences(served, tokenizer, byte_cases(tokenizer)[:2]))
