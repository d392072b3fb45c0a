"""Tokens, offsets and chat templates in the HTTP process equal those of the tokenizer and of transformers."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from stagdist.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.serving.api.served_model import ModelView
from stagdist.serving.api.token_texts import TextOffsets, TokenTexts
from stagdist.serving.settings import ServerSettings
from tests.serving.scripted_engine import hello

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
