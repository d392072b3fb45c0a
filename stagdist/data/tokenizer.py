"""Tokenizers: loading, training, and how many bytes of text each token represents.

Every tokenizer is a `tokenizer.json` of the `tokenizers` library, bytes included (byte-level, no merges), so that an
exported model directory carries one that `transformers` loads. Text is always encoded as text: a document in which
someone wrote the name of a special token cannot end itself.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from stagdist.errors import ConfigError, DataError
from stagdist.files import not_downloaded, writing

END_OF_DOCUMENT = "<|endoftext|>"
BYTES = "bytes"

_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
_CONFIG_FILE = "tokenizer_config.json"
_SIDE_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_UNUSED_FOR_ENCODING = ("version", "truncation", "padding", "post_processor", "decoder")


class Tokenizer:
    """Text to token ids and back.

    Args:
        json_text: content of a `tokenizer.json`.
        end_token: the token that ends a document.
        config: content of the `tokenizer_config.json` it came with, written again by `save`.
        side_files: further files of its directory by name, written again by `save`.

    Raises:
        DataError: the content is not a tokenizer, or lacks `end_token`.
    """

    def __init__(
        self,
        json_text: str,
        end_token: str,
        *,
        config: dict[str, Any] | None = None,
        side_files: dict[str, str] | None = None,
    ) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"not a tokenizer.json: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        end = self._backend.token_to_id(end_token)
        if end is None:
            raise DataError(f"the tokenizer has no token {end_token!r} to end documents with")
        self.end_token: str = end_token
        self.end_of_document: int = end
        self._config = config
        self._side_files = dict(side_files or {})

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = partial(Tokenizer, config=self._config, side_files=self._side_files)
        return rebuild, (self.to_json(), self.end_token)

    def to_json(self) -> str:
        """Content of its `tokenizer.json`."""
        return str(self._backend.to_str(pretty=True))

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id plus one, special tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def text_vocab_size(self) -> int:
        """Largest id that a text or its end can have, plus one. No text has the special tokens that were added."""
        added = self._backend.get_added_tokens_decoder().items()
        text = self._backend.get_vocab(with_added_tokens=False).values()
        return max(self.end_of_document, *text, *(index for index, token in added if not token.special)) + 1

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
        return self.fingerprint == Tokenizer(_byte_json(), END_OF_DOCUMENT).fingerprint

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added or recognized."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        if self.is_bytes:
            return [list(text.encode()) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str], dtype: type[np.generic]) -> list[np.ndarray]:
        """Token ids of several texts, each with the end-of-document token after it, as arrays of `dtype`."""
        end = np.array([self.end_of_document], dtype)
        if self.is_bytes:
            return [np.append(np.frombuffer(text.encode(), np.uint8).astype(dtype), end) for text in texts]
        return [np.append(np.array(ids, dtype), end) for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))

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
        """Write a directory that `transformers.AutoTokenizer` loads; `tokenizer.json` comes last.

        Raises:
            DataError: the directory cannot be written.
        """
        config = self._config or {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_token,
            "bos_token": self.end_token,
            "pad_token": self.end_token,
            "clean_up_tokenization_spaces": False,
        }
        files = {**self._side_files, _CONFIG_FILE: json.dumps(config, indent=2), "tokenizer.json": self.to_json()}
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                with writing(Path(directory, name)) as stream:
                    stream.write(text)
        except OSError as error:
            raise DataError(f"cannot write the tokenizer to {directory}: {error}") from error


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


def _byte_json() -> str:
    backend = tokenizers.Tokenizer(models.BPE({char: byte for byte, char in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_DOCUMENT])
    return str(backend.to_str())


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte (ids 0 to 255) and the end-of-document token (256)."""
    return Tokenizer(_byte_json(), END_OF_DOCUMENT)


def train_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: documents; read once, never held in memory together.
        vocab_size: tokens to end up with at most: 256 bytes, the end-of-document token, and merges.

    Raises:
        ConfigError: `vocab_size` is below 257.
        DataError: there is no text.
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
    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise DataError("no text to train a tokenizer on; give files with at least one document")
    backend.train_from_iterator(_batched(first, iterator), trainer)
    return Tokenizer(backend.to_str(), END_OF_DOCUMENT)


def _batched(first: str, rest: Iterator[str]) -> Iterator[list[str]]:
    batch = [first]
    for text in rest:
        batch.append(text)
        if len(batch) == 256:
            yield batch
            batch = []
    yield batch


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: `bytes`; a `tokenizer.json`; or a directory with one or with other Hugging Face tokenizer files.

    Raises:
        DataError: nothing that can be loaded is there, or nothing says which token ends a document.
    """
    if str(source) == BYTES:
        return byte_tokenizer()
    path = Path(source)
    if path.is_file():
        return _load_json(path)
    if not path.is_dir():
        raise DataError(f"tokenizer {source!s} does not exist; give `bytes`, a tokenizer.json or its directory")
    if (path / "tokenizer.json").is_file():
        return _load_json(path / "tokenizer.json")
    return _load_with_transformers(path)


def _load_json(path: Path) -> Tokenizer:
    if problem := not_downloaded(path):
        raise DataError(problem)
    try:
        json_text = path.read_text(encoding="utf-8")
        names = {added["content"] for added in json.loads(json_text).get("added_tokens", [])}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}") from error
    config = _read_config(path.parent / _CONFIG_FILE)
    end_token = (config or {}).get("eos_token")
    end_token = end_token.get("content") if isinstance(end_token, dict) else end_token
    end_token = end_token or next((name for name in _KNOWN_ENDS if name in names), None)
    if end_token is not None and not isinstance(end_token, str):
        raise DataError(f"{path.parent / _CONFIG_FILE}: eos_token is {end_token!r}; it must be the text of a token")
    if end_token is None:
        raise DataError(
            f"nothing says which token ends a document in {path}: put a {_CONFIG_FILE} with `eos_token` beside it"
        )
    sides = {name: (path.parent / name) for name in _SIDE_FILES}
    texts = {name: side.read_text(encoding="utf-8") for name, side in sides.items() if side.is_file()}
    try:
        return Tokenizer(json_text, end_token, config=config, side_files=texts)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return config


_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm")
"""One of these is in every directory from which transformers loads a tokenizer."""


def holds_tokenizer(directory: Path) -> bool:
    """Whether a directory contains files of a tokenizer, loadable or not."""
    return any(file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern))


def _load_with_transformers(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    if not holds_tokenizer(path):
        # The error of transformers would be about packages that are not installed.
        raise DataError(f"{path} holds no tokenizer.json nor any other tokenizer")
    try:
        # Without trust_remote_code transformers asks whether to run code of the directory, and reads the answer from
        # standard input, which may contain prompts.
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for unknown files
        raise DataError(f"{path} holds no tokenizer.json and transformers cannot load it either: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or loaded.eos_token is None:
        missing = "an end-of-text token (eos_token)" if backend is not None else "a fast version"
        raise DataError(f"the tokenizer in {path} has no {missing}; save it as tokenizer.json with `eos_token` set")
    return Tokenizer(backend.to_str(), loaded.eos_token)
