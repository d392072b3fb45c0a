"""Tokens, offsets and chat templates in the HTTP process equal those of the tokenizer and of transformers."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from stagdist.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.serving.api.served_model import ModelView
from stagdist.serving.api.token_texts import TextOffsets, TokenTexts
from stagdist.serving.settings import ServerSettings
from tests.data.foreign_tokenizers import KINDS, make
from tests.data.test_foreign_tokenizers import CHAT, PROMPTS
from tests.serving.scripted_engine import hello, serving

TEXT = "Grüße, the naïve 你好 🙂 end"
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}{% continue %}{% endif %}
<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ message | tojson }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def sentencepiece() -> Tokenizer:
    """A tokenizer with blanks in its pieces and bytes for what has none."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdehinrt", "\u2581h", "\u2581hi"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("\u2581", "h"), ("\u2581h", "i")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Tokenizer(backend.to_str(), None)


def test_the_fingerprint_is_that_of_everything_that_changes_tokens() -> None:
    shapes: list[dict[str, Any]] = [
        {},
        {"recurrent": True},
        {"precision": "fp64"},
        {"weights": "int8"},
        {"stages": 1},
        {"tensor": 2},
    ]
    greeting: Any = hello()
    found = [
        ModelView(greeting | {"model": greeting["model"] | shape}, ServerSettings(engine_socket="s"))
        for shape in shapes
    ]
    assert len({view.fingerprint for view in found}) == len(shapes)


@pytest.fixture(params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    kinds: dict[str, Any] = {
        "bytes": byte_tokenizer,
        "bpe": lambda: train_bpe([TEXT * 9, "hi there " * 9], 300),
        "sentencepiece": sentencepiece,
    }
    return kinds[request.param]()


def test_bytes_of_tokens_make_the_text(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    for text in (TEXT, "hi there"):
        data = b"".join(texts.bytes_of(token) for token in tokenizer.encode(text))
        assert data.decode().removeprefix(" ") == text


def test_offsets_lead_to_the_characters(tokenizer: Tokenizer) -> None:
    """The first character of each token that holds complete ones is at its offset."""
    texts = TokenTexts(tokenizer)
    for text in (TEXT, "hi there"):
        ids = tokenizer.encode(text)
        offsets = TextOffsets(texts, skip_special_tokens=True, text=text, first=ids)
        places = [offsets.next(token) for token in ids]
        assert places == sorted(places)
        for token, place in zip(ids, places, strict=True):
            name = texts.name(token)
            if not name.startswith("bytes:"):
                assert text[place:].startswith(name if place else name.removeprefix(" ")), (name, place)


def test_special_tokens_take_no_place_where_they_are_skipped() -> None:
    texts = TokenTexts(byte_tokenizer())
    for skip, expected in ((True, [0, 0, 1]), (False, [0, 13, 14])):
        offsets = TextOffsets(texts, skip_special_tokens=skip)
        assert [offsets.next(token) for token in (256, 97, 98)] == expected


def test_unused_ids_have_no_text() -> None:
    texts = TokenTexts(byte_tokenizer())
    assert (texts.name(256), texts.name(300), texts.name(5, as_id=True)) == ("<|endoftext|>", "", "token_id:5")


def test_a_conversation_is_encoded_as_transformers_does(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    loaded = load_tokenizer(tmp_path)
    first: Any = hello(json=loaded.to_json(), special_tokens=loaded.special_tokens, chat_template=loaded.chat_template)
    view = ModelView(first, ServerSettings(engine_socket="/s"))
    messages = [
        {"role": "system", "content": " Be <b>brief</b>. "},
        {"role": "user", "content": "Grüße <|endoftext|>"},
        {"role": "system", "content": "skipped"},
    ]
    expected = loaded.encode_chat(messages)
    assert 256 in expected
    assert view.encode_chat(messages) == expected
    assert view.encode_chat(messages[:1]) != expected


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_conversations_have_the_ids_of_transformers_over_http(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make(kind, tmp_path / kind)
    theirs: Any = AutoTokenizer.from_pretrained(str(folder))
    ours = load_tokenizer(folder)
    content = {"end_token": ours.end_token, "special_tokens": ours.special_tokens, "chat_template": ours.chat_template}
    first: Any = hello(json=ours.to_json(), **content)
    first["model"] |= {"vocab_size": ours.vocab_size, "max_context": 512}
    with serving(tmp_path, first=first) as server, server.client() as http:

        def sent(path: str, **body: Any) -> httpx.Response:
            server.engine.submitted.clear()
            return http.post(path, json={"max_tokens": 1, **body})

        def assert_prompt(expected: list[int], path: str, **body: Any) -> None:
            answer = sent(path, **body)
            assert (answer.status_code == 200) == bool(expected), answer.text
            assert [each["prompt"] for each in server.engine.submitted] == [expected] * bool(expected), body

        for text in PROMPTS:
            for options in ({}, {"parse_special": True}, {"add_special_tokens": False}):
                named = {"split_special_tokens": not options.get("parse_special"),
                         "add_special_tokens": options.get("add_special_tokens", True)}  # fmt: skip
                expected = theirs(text, **named)["input_ids"]
                assert_prompt(expected, "/v1/completions", prompt=text, **options)
                assert_prompt(expected, "/v1/completions", prompt=expected)
                tokens = sent("/tokenize", prompt=text, **({"parse_special": False} | options)).json()["tokens"]
                assert tokens == expected
            assert sent("/tokenize", prompt=text).json()["tokens"] == theirs(text)["input_ids"]
            assert sent("/detokenize", tokens=expected).json()["prompt"] == theirs.decode(expected)
        texts = list(filter(None, PROMPTS))
        sent("/v1/completions", prompt=texts)
        assert [each["prompt"] for each in server.engine.submitted] == [
            theirs(text, split_special_tokens=True)["input_ids"] for text in texts
        ]
        if theirs.chat_template is None:
            assert sent("/v1/chat/completions", messages=CHAT).json()["error"]["code"] == "no_chat_template"
            return
        for messages in (CHAT, [{"role": "user", "content": PROMPTS[-2]}]):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert_prompt(expected, "/v1/chat/completions", messages=messages)
            assert sent("/tokenize", messages=messages).json()["tokens"] == expected
