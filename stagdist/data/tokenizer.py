"""Tokenizers: text to token ids and back, and how many bytes of text each token represents.

Every tokenizer is a `tokenizer.json` of the `tokenizers` library, bytes included (byte-level, no merges), so that an
exported model directory carries one that `transformers` loads. `tokenizer_files` loads those of other models.

Documents are encoded as text: a document in which someone wrote the name of a special token cannot end itself.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from stagdist.data.post_processor import ids_before_text
from stagdist.errors import ConfigError, DataError
from stagdist.files import writing

END_OF_DOCUMENT = "<|endoftext|>"
BYTES = "bytes"

_UNUSED_FOR_ENCODING = ("version", "truncation", "padding", "post_processor", "decoder")

Messages = Sequence[Mapping[str, Any]]
"""A conversation as chat templates read it: objects with the keys `role` and `content`."""


class Tokenizer:
    """Text to token ids and back.

    A copy made by pickling encodes and decodes, but has no chat template and cannot be saved.

    Args:
        json_text: content of a `tokenizer.json`.
        end_token: the token that ends a document; None if the tokenizer has none.
        origin: the `PreTrainedTokenizerFast` that it was loaded as; renders chat templates.
        files: content of the files that it was loaded from, by relative path; they are saved as they are. None if only
            `origin` can write files that mean the same in every directory.

    Attributes:
        begin_ids: the special tokens that it puts before a text, mostly none or one; documents begin with them too.

    Raises:
        DataError: the content is not a tokenizer, or lacks `end_token`.
    """

    def __init__(
        self, json_text: str, end_token: str | None, *, origin: Any = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"not a tokenizer.json: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.end_token = end_token
        self._end_id = None if end_token is None else self._backend.token_to_id(end_token)
        if end_token is not None and self._end_id is None:
            raise DataError(f"the tokenizer has no token {end_token!r} to end documents with")
        self.begin_ids = ids_before_text(json.loads(json_text).get("post_processor"))
        self._origin, self._files = origin, files

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.to_json(), self.end_token)

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends a document.

        Raises:
            DataError: the tokenizer has none.
        """
        if self._end_id is None:
            raise DataError(
                "nothing says which token ends a document: set `eos_token` in the tokenizer_config.json beside the "
                "tokenizer.json"
            )
        return self._end_id

    @property
    def pad_id(self) -> int | None:
        """Id of the token that pads texts in `transformers`, where its files name one."""
        return None if self._origin is None else self._origin.pad_token_id

    def without_begin(self) -> "Tokenizer":
        """The same tokenizer, which adds no special tokens to a text: for a model whose documents began with none."""
        content = json.loads(self.to_json()) | {"post_processor": None}
        origin = copy.deepcopy(self._origin)
        if origin is not None:
            origin.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
        return Tokenizer(json.dumps(content), self.end_token, origin=origin)

    def to_json(self) -> str:
        """Content of its `tokenizer.json`."""
        return str(self._backend.to_str(pretty=True))

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id plus one, special tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def text_vocab_size(self) -> int:
        """Largest id of a text with its begin and end, plus one. Special tokens that were added are in no text."""
        added = self._backend.get_added_tokens_decoder().items()
        text = [index for index, token in added if not token.special or index in (self._end_id, *self.begin_ids)]
        return max([*text, *self._backend.get_vocab(with_added_tokens=False).values()], default=-1) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything in the `tokenizer.json` that decides how text becomes ids."""
        content = json.loads(self.to_json())
        for key in _UNUSED_FOR_ENCODING:
            content.pop(key, None)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def is_bytes(self) -> bool:
        """Whether token ids are exactly the UTF-8 bytes (and the end-of-document token)."""
        return self.fingerprint == byte_tokenizer().fingerprint

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added or recognized."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt, as `transformers` encodes it.

        Args:
            add_special_tokens: add the special tokens that the tokenizer puts around a text.
            parse_special: special tokens that are written in the text become themselves, not text.

        Raises:
            DataError: as `encode_batch`.
        """
        backend = self._parsing_backend if parse_special else self._backend
        with _encoding_errors():
            # A batch of one, since other threads run meanwhile: megabytes of text take seconds.
            return list(backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    @cached_property
    def _parsing_backend(self) -> tokenizers.Tokenizer:
        """One of its own, since threads encode at the same time."""
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        backend.encode_special_tokens = False
        return backend

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._origin is not None and self._origin.chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, None if there is none; of several, the one named `default`."""
        template = None if self._origin is None else self._origin.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of the special tokens by the name of their use (`bos_token`), as chat templates read them."""
        if self._origin is None:
            return {} if self.end_token is None else {"eos_token": self.end_token}
        return {name: str(token) for name, token in self._origin.special_tokens_map.items() if isinstance(token, str)}

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation in the tokenizer's chat template, up to the beginning of the answer.

        Raises:
            ConfigError: there is no chat template, or it refuses the messages.
            DataError: as `encode_batch`.
        """
        if not self.has_chat_template:
            raise ConfigError("the tokenizer of the model has no chat template; give the prompt as text")
        try:
            text = self._origin.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it wants
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"the chat template of the model refuses the messages: {reason}") from error
        return self.encode_prompt(text, add_special_tokens=False, parse_special=True)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts.

        Raises:
            DataError: a text has characters for which the tokenizer has no token, not even an unknown one.
        """
        if self.is_bytes:
            return [list(text.encode()) for text in texts]
        with _encoding_errors():
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str], dtype: type[np.generic]) -> list[np.ndarray]:
        """Token ids of several documents as arrays of `dtype`: `begin_ids`, the text, the end-of-document token."""
        begin, end = np.array(self.begin_ids, dtype), np.array([self.end_of_document], dtype)
        if self.is_bytes:
            return [np.append(np.frombuffer(text.encode(), np.uint8).astype(dtype), end) for text in texts]
        return [np.concatenate((begin, np.array(ids, dtype), end)) for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))

    def piece(self, token: int) -> str | None:
        """How the vocabulary writes a token; None for unused ids."""
        return self._backend.id_to_token(token)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token represents; 0 for special tokens and unused ids.

        For byte-level tokenizers the sum over an encoded text is exactly the length of its UTF-8 (of its normalized
        form, where the tokenizer normalizes). For SentencePiece-like ones the blank that many put before a text
        counts as one byte more.

        Shapes: int32 [vocab_size].

        Raises:
            DataError: the tokens of this kind of tokenizer do not say which bytes they stand for.
        """
        content = json.loads(self.to_json())
        counts = np.zeros(self.vocab_size, np.int32)
        length = _byte_counter(content)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            counts[index] = length(token)
        for added in content["added_tokens"]:
            counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return counts

    def save(self, directory: str | Path) -> None:
        """Write a directory that `transformers.AutoTokenizer` loads, with everything that it was loaded with.

        Raises:
            DataError: the directory cannot be written.
        """
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            if self._origin is not None and self._files is None:
                self._origin.save_pretrained(directory)
                return
            for name, content in (self._files or self._own_files()).items():
                Path(directory, name).parent.mkdir(exist_ok=True)
                with writing(Path(directory, name), "wb") as stream:
                    stream.write(content)
        except OSError as error:
            raise DataError(f"cannot write the tokenizer to {directory}: {error}") from error

    def _own_files(self) -> dict[str, bytes]:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_token,
            "bos_token": self.end_token,
            "pad_token": self.end_token,
            "clean_up_tokenization_spaces": False,
        }
        texts = {"tokenizer_config.json": json.dumps(config, indent=2), "tokenizer.json": self.to_json()}
        return {name: text.encode() for name, text in texts.items()}


@contextmanager
def _encoding_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"the tokenizer cannot encode the text: {error}; add an unknown token to its model") from error


def _byte_counter(content: dict[str, Any]) -> Any:
    """Function from a token's text to its number of bytes."""
    kinds = set(_kinds(content.get("pre_tokenizer"))) | set(_kinds(content.get("decoder")))
    if "ByteLevel" in kinds:
        return len  # one character of the byte-level alphabet per byte
    if "Metaspace" in kinds or content["model"].get("byte_fallback"):
        return _sentencepiece_bytes
    raise DataError(
        f"a {content['model'].get('type')} tokenizer that is neither byte-level nor SentencePiece-like does not say "
        "how many bytes its tokens stand for; use a byte-level one (tools/train_tokenizer.py makes them)"
    )


def _kinds(part: Any) -> Iterator[str]:
    """The `type` of a component and of all components inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.values():
            yield from _kinds(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _kinds(inner)


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())


def byte_alphabet() -> list[str]:
    """The printable character that represents each byte in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    table = {byte: chr(byte) for byte in plain}
    rest = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(256 + offset) for offset, byte in enumerate(rest)})
    return [table[byte] for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte (ids 0 to 255) and the end-of-document token (256)."""
    backend = tokenizers.Tokenizer(models.BPE({char: byte for byte, char in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_DOCUMENT])
    return Tokenizer(backend.to_str(), END_OF_DOCUMENT)


def train_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: documents; read once, never held in memory together.
        vocab_size: tokens to end up with at most: 256 bytes, the end-of-document token, and merges.

    Raises:
        ConfigError: `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise ConfigError(f"vocabulary size {vocab_size} is below 257 (256 bytes and the end-of-document token)")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(), END_OF_DOCUMENT)
