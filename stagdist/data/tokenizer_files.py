"""Loading the tokenizer of a directory: with `transformers`, so that its files mean here what they mean there."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

from stagdist.data.post_processor import undefined_tokens
from stagdist.data.tokenizer import BYTES, END_OF_DOCUMENT, Tokenizer, byte_tokenizer
from stagdist.errors import DataError
from stagdist.files import not_downloaded

JSON_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that say which tokens end, begin and pad a text."""

_MORE_FILES = ("added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja")

_TOKEN_KEYS = {"content", "single_word", "lstrip", "rstrip", "normalized", "special", "__type"}

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm")
"""One of these is in every directory from which transformers loads a tokenizer."""

_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
"""Tokens that end a document where a `tokenizer.json` comes without any other file."""


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: `bytes`; a `tokenizer.json`; or a directory with one or with other Hugging Face tokenizer files.

    Raises:
        DataError: nothing that can be loaded is there, or a package is missing; the message names the file.
    """
    if str(source) == BYTES:
        return byte_tokenizer()
    path = Path(source)
    if path.is_file() and path.name == JSON_FILE:
        path = path.parent
    if path.is_dir():
        return _load(path, path)
    if not path.is_file():
        raise DataError(f"tokenizer {source!s} does not exist; give `bytes`, a {JSON_FILE} or its directory")
    with tempfile.TemporaryDirectory(prefix="stagdist-tokenizer-") as alone:
        Path(alone, JSON_FILE).symlink_to(path.resolve())
        return _load(Path(alone), path)


def holds_tokenizer(directory: Path) -> bool:
    """Whether a directory contains files of a tokenizer, loadable or not."""
    return any(file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern))


def _load(directory: Path, named: Path) -> Tokenizer:
    """Load from a directory; `named` is the path for messages."""
    if not holds_tokenizer(directory):
        raise DataError(f"{named} holds no {JSON_FILE} nor any other tokenizer")
    if (directory / JSON_FILE).exists():
        read = [file for name in (JSON_FILE, *CONFIG_FILES) if (file := directory / name).is_file()]
    else:
        read = [file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern) if file.is_file()]
    if problem := next(filter(None, (not_downloaded(_shown(file, named)) for file in read)), None):
        raise DataError(problem)
    raw = _raw(directory / JSON_FILE, named) if (directory / JSON_FILE).exists() else None
    configs = {name: _json_object(directory / name) for name in CONFIG_FILES if (directory / name).exists()}
    if raw is None:
        _require_packages(directory)
    loaded = _load_with_transformers(directory, named)
    end_token = loaded.eos_token
    if end_token is None and raw is not None and not configs:
        names = loaded.get_added_vocab()
        end_token = next((name for name in _KNOWN_ENDS if name in names), None)
        if end_token is not None:
            loaded.add_special_tokens({"eos_token": end_token})
    templates = loaded.chat_template.values() if isinstance(loaded.chat_template, dict) else [loaded.chat_template]
    if not all(isinstance(template, str | None) for template in templates):
        raise DataError(f"{named}: the chat_template of its files is not text; write the Jinja template")
    if end_token is not None and raw is not None and not _has_token(raw, configs.values(), end_token):
        raise DataError(
            f"{named}: eos_token is {end_token!r}, but its {JSON_FILE} has no such token; correct one of them"
        )
    # Without its class, what the files mean depends on the config.json beside them.
    has_class = raw is not None and "tokenizer_class" in configs.get("tokenizer_config.json", {})
    files = _contents(directory) if has_class else None
    try:
        return Tokenizer(loaded.backend_tokenizer.to_str(), end_token, origin=loaded, files=files)
    except DataError as error:
        raise DataError(f"{named}: {error}") from error


def _contents(directory: Path) -> dict[str, bytes]:
    """The files of a tokenizer with a `tokenizer.json`, which comes last."""
    names = (*CONFIG_FILES, *_MORE_FILES, JSON_FILE)
    paths = [path for name in names for path in sorted(directory.glob(name)) if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def _raw(path: Path, named: Path) -> tokenizers.Tokenizer:
    """The content of a `tokenizer.json`, read without the files beside it; errors of transformers do not name it."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        raw = tokenizers.Tokenizer.from_str(text)
        odd = sorted(undefined_tokens(content.get("post_processor")))
    except BaseException as error:
        raise DataError(f"cannot read the tokenizer {_shown(path, named)}: {_reason(error)}; restore it") from error
    if odd:
        raise DataError(
            f"cannot read the tokenizer {_shown(path, named)}: its post_processor adds the token {odd[0]!r}, which its "
            "special_tokens do not define; restore it"
        )
    return raw


def _json_object(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {_reason(error)}; restore it") from error
    if not isinstance(body, dict):
        raise DataError(f"cannot read the tokenizer {path}: it does not hold a JSON object; restore it")
    nested = body.get("added_tokens_decoder")
    for value in (*body.values(), *(nested.values() if isinstance(nested, dict) else ())):
        # The library would print a warning of its own to standard output.
        if isinstance(value, dict) and (_TOKEN_KEYS & value.keys()) and (odd := sorted(value.keys() - _TOKEN_KEYS)):
            raise DataError(f"cannot read the tokenizer {path}: a token has the unknown key {odd[0]!r}; restore it")
    return body


def _shown(path: Path, named: Path) -> Path:
    return named if named.is_file() else path


def _reason(error: BaseException) -> str:
    """The text of an error of the tokenizer libraries; others that are no `Exception` are raised again.

    The Rust library raises its own kind for a panic.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    if "UTF-8 BOM" in str(error):
        return "it begins with a byte order mark; save it without one"
    return " ".join(str(error).split()) or type(error).__name__


def _has_token(raw: tokenizers.Tokenizer, configs: Iterable[dict[str, Any]], token: str) -> bool:
    """Whether the files define a token, apart from naming it as the one that ends a text."""
    entries = [entry for config in configs for entry in config.get("added_tokens_decoder", {}).values()]
    return raw.token_to_id(token) is not None or any(entry.get("content") == token for entry in entries)


def _require_packages(directory: Path) -> None:
    """Name the package that a tokenizer needs and lacks; the advice of transformers is about another format."""
    for path in sorted(directory.glob("*.model")) + sorted(directory.glob("*.spm")):
        with path.open("rb") as stream:
            is_protobuf = stream.read(1) == b"\n"  # field 1 of a SentencePiece model; tiktoken files are base64
        package = "sentencepiece" if is_protobuf else "tiktoken"
        if find_spec(package) is None:
            raise DataError(f"{path} needs the package {package}: pip install {package}")


def _load_with_transformers(directory: Path, named: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            # Without trust_remote_code transformers asks whether to run code of the directory, and reads the answer
            # from standard input, which may contain prompts.
            loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        files = ", ".join(name for name in (JSON_FILE, *CONFIG_FILES) if (directory / name).exists())
        of = f" ({files})" if files else ""
        raise DataError(
            f"{named}: transformers cannot load the tokenizer{of}: {_reason(error)}; restore its files"
        ) from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise DataError(f"the tokenizer in {named} has no fast version; save it as {JSON_FILE}")
    for key in ("is_local", "local_files_only"):  # how it was loaded, which transformers would save
        loaded.init_kwargs.pop(key, None)
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of transformers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
