"""Mutated files of prompts and held-out texts."""

import json
from pathlib import Path

import pytest

from stagdist.data.tokenizer import byte_tokenizer
from stagdist.decode.frontend.prompts import make_request, prompts_from_file
from stagdist.decode.request import SamplingParams
from stagdist.errors import ConfigError, DataError
from stagdist.evaluation.bits_per_byte import read_text
from tests.fuzz.mutations import mutations

PROMPTS = [{"id": f"row-{i}", "prompt": f"def f{i}(é): return '日本'", "temperature": 0.5, "seed": i} for i in range(6)]
LINES = [json.dumps(prompt, ensure_ascii=False).encode() + b"\n" for prompt in PROMPTS]


def test_every_line_of_a_mutated_file_is_a_request_or_one_line_of_error(tmp_path: Path) -> None:
    """A mutation harms its own line alone, apart from a flipped line end, which joins or divides two."""
    path, tokenizer = tmp_path / "prompts.jsonl", byte_tokenizer()
    for mutation in mutations(b"".join(LINES)):
        path.write_bytes(mutation.content)
        ends = [len(b"".join(LINES[: i + 1])) for i in range(len(LINES))]
        intact = sum(end <= mutation.kept for end in ends)
        for number, prompt in enumerate(prompts_from_file(path)):
            try:
                request = make_request(prompt, SamplingParams(), tokenizer)
            except ConfigError as error:
                assert number >= intact, mutation.name
                assert str(error).startswith(f"line {number + 1} of prompts.jsonl"), mutation.name
                assert "\n" not in str(error), mutation.name
            else:
                if number < intact:
                    assert (prompt.name, prompt.text) == (PROMPTS[number]["id"], PROMPTS[number]["prompt"])
                    assert request.params.seed == number and request.params.temperature == 0.5


def test_text_prompts_are_read_or_refused_one_by_one(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "prompts.txt", byte_tokenizer()
    text = "".join(f"{prompt['prompt']}\n" for prompt in PROMPTS).encode()
    for mutation in mutations(text):
        path.write_bytes(mutation.content)
        lines = mutation.content.split(b"\n")
        for prompt in prompts_from_file(path):
            try:
                request = make_request(prompt, SamplingParams(), tokenizer)
            except ConfigError as error:
                assert "is not UTF-8" in str(error) and f"line {prompt.index + 1} of" in str(error), mutation.name
            else:
                assert bytes(request.prompt_ids) == lines[prompt.index].removesuffix(b"\r"), mutation.name


def test_a_held_out_text_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "held-out.txt"
    for mutation in mutations("zwölf Boxkämpfer 日本\r\n".encode() * 20):
        path.write_bytes(mutation.content)
        try:
            assert read_text(path).encode() == mutation.content, mutation.name
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error), mutation.name
            controls = sum(byte < 32 and byte not in b"\t\n\r" for byte in mutation.content)
            if controls <= 4:  # then the only fault can be the encoding
                with pytest.raises(UnicodeDecodeError):
                    mutation.content.decode()
