"""Tokenizers of published models mean here what they mean in `transformers`, also after they were saved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from stagdist.config.parts import DataConfig
from stagdist.data.compatibility import check_data
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import DataError
from tests.data.foreign_tokenizers import KINDS, make, write_json

PROMPTS = [
    "", " ", "def main(", "  the cat\n\n the  dog", "é 日本 👍 \u2028 \x00", "the</s> <s>cat<|stop|>",
    "<tool> a<|fim|>b    c",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "[INST] the cat [/INST] <|endoftext|>",
]  # fmt: skip
CHAT = [{"role": "user", "content": "the cat </s> "}, {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "é?"}]  # fmt: skip


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Tokenizer]:
    """The tokenizer of transformers and ours, of one directory."""
    return _pair(make(request.param, tmp_path / request.param))


def _pair(folder: Path) -> tuple[Any, Tokenizer]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(folder)


def assert_same(theirs: Any, ours: Tokenizer) -> None:
    """The same ids for prompts and conversations, and the same tokens around a text."""
    for text in PROMPTS:
        for added in (True, False):
            plain = theirs(text, add_special_tokens=added, split_special_tokens=True)["input_ids"]
            parsed = theirs(text, add_special_tokens=added, split_special_tokens=False)["input_ids"]
            assert ours.encode_prompt(text, add_special_tokens=added) == plain, text
            assert ours.encode_prompt(text, add_special_tokens=added, parse_special=True) == parsed, text
            assert added or ours.encode(text) == plain
    assert ours.end_token == theirs.eos_token
    assert ours.has_chat_template == (theirs.chat_template is not None)
    if ours.has_chat_template:
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(CHAT) == expected and len(expected) > 10


def test_prompts_and_conversations_have_the_ids_of_transformers(pair: tuple[Any, Tokenizer]) -> None:
    assert_same(*pair)


def test_a_saved_tokenizer_has_lost_nothing(pair: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path / "saved")
    again, loaded = _pair(tmp_path / "saved")
    assert again.special_tokens_map == theirs.special_tokens_map
    assert again.chat_template == theirs.chat_template
    assert loaded.fingerprint == ours.fingerprint and loaded.begin_ids == ours.begin_ids
    assert_same(again, loaded)
    assert_same(theirs, loaded)


def test_documents_begin_as_the_tokenizer_begins_a_text(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    begins = list(ours.begin_ids)
    assert begins == ([theirs.bos_token_id] if theirs("a")["input_ids"][0] == theirs.bos_token_id else [])
    if ours.end_token is None:
        with pytest.raises(DataError, match="set `eos_token` in the tokenizer_config.json"):
            ours.encode_arrays(["a"], np.uint16)
        return
    (document,) = ours.encode_arrays(["the cat"], np.uint16)
    assert document.tolist() == [*begins, *ours.encode("the cat"), theirs.eos_token_id]


def test_without_begin_nothing_is_added_here_and_in_transformers(pair: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    theirs, ours = pair
    bare = ours.without_begin()
    assert bare.begin_ids == () and bare.encode_prompt("the cat") == ours.encode("the cat")
    bare.save(tmp_path / "bare")
    again, loaded = _pair(tmp_path / "bare")
    assert again("the cat")["input_ids"] == loaded.encode_prompt("the cat") == ours.encode("the cat")
    assert again.bos_token == theirs.bos_token and bare.fingerprint == ours.fingerprint
    assert load_tokenizer(tmp_path / next(iter(KINDS.keys() & {p.name for p in tmp_path.iterdir()}))).begin_ids == (
        ours.begin_ids
    )


@pytest.mark.parametrize(("content", "package"), [(None, "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")])
def test_a_missing_package_is_named(
    content: bytes | None, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("sentencepiece_model", tmp_path / "model")
    if content is not None:
        (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("stagdist.data.tokenizer_files.find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"tokenizer.model needs the package {package}: pip install {package}$"):
        load_tokenizer(folder)


@pytest.mark.parametrize("template", [5, {"default": 5}, [{"name": "default", "template": []}]])
def test_a_template_that_is_no_text_is_named(template: Any, tmp_path: Path) -> None:
    folder = make("gpt_2", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text()), "chat_template": template})
    with pytest.raises(DataError, match=f"^{folder}: the chat_template of its files is not text"):
        load_tokenizer(folder)


def test_control_tokens_of_a_template_are_recognized_where_the_configuration_splits_those_of_texts(
    tmp_path: Path,
) -> None:
    folder = make("llama_3", tmp_path / "model")
    path, plain = folder / "tokenizer_config.json", load_tokenizer(folder)
    write_json(path, {**json.loads(path.read_text()), "split_special_tokens": True, "model_max_length": 4})
    assert load_tokenizer(folder).encode_chat(CHAT) == plain.encode_chat(CHAT)


def test_a_corpus_whose_documents_begin_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make("llama_3", tmp_path / "tokenizer"))
    tokenizer.without_begin().save(tmp_path / "bare")
    (tmp_path / "text.txt").write_text("the cat " * 50)
    for name, maker in (("begins", tokenizer), ("older", tokenizer.without_begin())):
        prepare([str(tmp_path / "text.txt")], str(tmp_path / name), maker)
    accepted = []
    for corpus in ("begins", "older"):
        for place in ("tokenizer", "bare"):
            data = DataConfig.model_validate(
                {
                    "tokenizer": str(tmp_path / place),
                    "split": [1, 0, 0],
                    "corpora": [{"prefix": str(tmp_path / corpus)}],
                }
            )
            try:
                check_data(data, sequence_length=8, vocab_size=tokenizer.vocab_size)
            except DataError as error:
                assert "begin with the token ids" in str(error) and str(tmp_path / corpus) in str(error)
            else:
                accepted.append((corpus, place))
    assert accepted == [("begins", "tokenizer"), ("older", "tokenizer"), ("older", "bare")]


@pytest.mark.parametrize(
    ("processor", "begin"),
    [
        (None, ()),
        (processors.ByteLevel(), ()),
        (processors.BertProcessing(("</s>", 1), ("<s>", 0)), (0,)),
        (processors.RobertaProcessing(("</s>", 1), ("<s>", 0)), (0,)),
        (processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]), (0,)),
        (processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]), ()),
        (processors.TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]), (0, 1)),
    ],
)
def test_the_begin_is_known_without_a_text_and_what_cannot_be_encoded_is_refused(
    processor: Any, begin: tuple[int, ...]
) -> None:
    """This vocabulary has no token for most texts, and none that stands for the unknown."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "b": 2}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    if processor is not None:
        backend.post_processor = processor
    tokenizer = Tokenizer(backend.to_str(), "</s>")
    assert tokenizer.begin_ids == begin == tuple(tokenizer.encode_prompt("b")[: len(begin)])
    assert tokenizer.encode_arrays(["b b"], np.uint16)[0].tolist() == [*begin, 2, 2, 1]
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        with pytest.raises(DataError, match="cannot encode the text: .*; add an unknown token"):
            encode("a")
