"""Prompts mean to `launch/generate.py` what they mean to the tokenizer of the model in `transformers`."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagdist.data.tokenizer_files import load_tokenizer
from tests.data.foreign_tokenizers import KINDS, make
from tests.data.test_foreign_tokenizers import CHAT, PROMPTS
from tests.launch.generating import error_lines, run_ranks_to_end, write_model
from tests.launch.serving import serve

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The directory of a tokenizer, and one of a model that was written with it."""
    folder = tmp_path_factory.mktemp("models")
    source = make(request.param, folder / "tokenizer")
    return source, write_model(folder / "model", load_tokenizer(source), max_position_embeddings=512)


def answers(model: Path, prompts: list[dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    """The answers of a run to prompts of a file, in their order."""
    path = model.parent / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, **prompt}) + "\n" for i, prompt in enumerate(prompts)))
    done = run_ranks_to_end(model, "--prompts-file", str(path), "--max-new-tokens", "2", "--json", *arguments)
    assert done.returncode in (0, 1), done.stderr.decode()
    return sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda answer: answer["id"])


@pytest.mark.parametrize("arguments", [(), ("--parse-special",), ("--no-special-tokens",)], ids=lambda a: a or "plain")
def test_prompts_have_the_ids_of_transformers(models: tuple[Path, Path], arguments: tuple[str, ...]) -> None:
    source, model = models
    theirs = AutoTokenizer.from_pretrained(str(source))
    exported = AutoTokenizer.from_pretrained(str(model))
    options = {
        "add_special_tokens": "--no-special-tokens" not in arguments,
        "split_special_tokens": "--parse-special" not in arguments,
    }
    found = answers(model, [{"prompt": text} for text in PROMPTS], *arguments)
    for text, answer in zip(PROMPTS, found, strict=True):
        expected = theirs(text, **options)["input_ids"]
        assert exported(text, **options)["input_ids"] == expected
        assert answer.get("prompt_token_ids", []) == expected, text
        assert bool(expected) or "the prompt is empty" in answer["error"]


def test_texts_are_continued_as_by_transformers(models: tuple[Path, Path]) -> None:
    source, model = models
    theirs = AutoTokenizer.from_pretrained(str(source))
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), trust_remote_code=True, dtype=torch.float32)
    path = model.parent / "texts.txt"
    path.write_text("the cat\ndef main(\n")
    done = run_ranks_to_end(
        model, "--prompts-file", str(path), "--temperature", "0", "--max-new-tokens", "8", "--parse-special", "--json"
    )
    for text, line in zip(("the cat", "def main("), done.stdout.splitlines(), strict=True):
        given = theirs(text, return_tensors="pt")["input_ids"]
        expected = loaded.generate(given, max_new_tokens=8, do_sample=False)[0, given.shape[1] :].tolist()
        assert json.loads(line)["token_ids"] == expected


def test_conversations_have_the_ids_of_transformers(models: tuple[Path, Path]) -> None:
    source, model = models
    theirs = AutoTokenizer.from_pretrained(str(source))
    (answer,) = answers(model, [{"messages": CHAT}])
    if theirs.chat_template is None:
        assert "the tokenizer of the model has no chat template" in answer["error"]
        return
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert answer["prompt_token_ids"] == expected
    (answer,) = answers(model, [{"prompt": "hi"}], "--chat")
    message = [{"role": "user", "content": "hi"}]
    assert answer["prompt_token_ids"] == theirs.apply_chat_template(
        message, add_generation_prompt=True, return_dict=False
    )


def test_a_server_gives_prompts_the_ids_of_transformers(tmp_path: Path) -> None:
    """`tests/serving/test_served_model.py` has all kinds of tokenizers."""
    source = make("llama_3", tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(str(source))
    model = write_model(tmp_path / "model", load_tokenizer(source), max_position_embeddings=512)
    served = serve(tmp_path, model, ranks=None).wait_ready()
    texts = list(filter(None, PROMPTS))
    choices = served.complete(texts, max_tokens=1, return_token_ids=True).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [
        theirs(text, split_special_tokens=True)["input_ids"] for text in texts
    ]
    chat = httpx.post(f"{served.url}/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert chat == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)


def test_a_model_without_a_template_refuses_chat_at_once(tmp_path: Path) -> None:
    done = run_ranks_to_end(write_model(tmp_path / "model"), "--prompt", "a", "--chat")
    assert done.returncode == 2
    assert error_lines(done.stderr.decode()) == [
        f"error: --chat needs a chat template, and {tmp_path / 'model'} has none; leave --chat out"
    ]


@pytest.mark.parametrize("option", ["--no-special-tokens", "--parse-special"])
def test_chat_leaves_special_tokens_to_the_template(option: str, tmp_path: Path) -> None:
    done = run_ranks_to_end(tmp_path, "--prompt", "a", "--chat", option)
    assert done.returncode == 2 and "--chat leaves special tokens to the template" in done.stderr.decode()


def test_a_template_that_refuses_messages_is_one_line(tmp_path: Path) -> None:
    source = make("llama_3", tmp_path / "tokenizer")
    (source / "chat_template.jinja").write_text("{{ raise_exception('roles must\nalternate') }}")
    (answer,) = answers(write_model(tmp_path / "model", load_tokenizer(source)), [{"messages": CHAT}])
    assert answer["error"].endswith("the chat template of the model refuses the messages: roles must alternate")
