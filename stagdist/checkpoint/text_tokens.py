"""Special tokens of a model directory, which conversions keep. Imports no torch, as `training.directory`."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_DEPTH = 20
"""Nesting limit of a JSON file of settings, which is copied recursively."""

GENERATION = "generation_config.json"
"""File with the default generation settings of `transformers`."""


@dataclass(frozen=True)
class TextTokens:
    """The special tokens in two files.

    Attributes:
        config: the `TOKEN_KEYS` of `config.json`.
        generation: the content of `generation_config.json`.
    """

    config: dict[str, Any]
    generation: dict[str, Any]


def tokens_of(end_of_document: int, begin: int | None = None, pad: int | None = None) -> TextTokens:
    """Special tokens of a tokenizer. Without a token for padding the end token pads the rows that have ended."""
    return TextTokens(
        {"bos_token_id": begin, "eos_token_id": end_of_document},
        {"eos_token_id": end_of_document, "pad_token_id": end_of_document if pad is None else pad},
    )


def tokens_of_tokenizer(tokenizer: Tokenizer) -> TextTokens:
    """Special tokens of a model that was trained with a tokenizer.

    Raises:
        DataError: nothing says which token ends a document.
    """
    return tokens_of(tokenizer.end_of_document, next(iter(tokenizer.begin_ids), None), tokenizer.pad_id)


def recorded_tokens(record: Any, path: Path) -> TextTokens | None:
    """The special tokens in the `state.json` of a training checkpoint; None if it has none.

    Args:
        record: value of the key.
        path: path of the file, for error messages.

    Raises:
        CheckpointError: the value is invalid; the message names the key.
    """
    if record is None:
        return None
    if not isinstance(record, dict) or set(record) != {"config", "generation"}:
        raise CheckpointError(f"{path}: text_tokens is {reprlib.repr(record)}; config and generation are needed")
    for part, held in record.items():
        if not isinstance(held, dict):
            raise CheckpointError(f"{path}: text_tokens.{part} is {reprlib.repr(held)}; an object is needed")
        check_tokens(held, f"{path}: text_tokens.{part}")
    if odd := sorted(set(record["config"]) - set(TOKEN_KEYS)):
        raise CheckpointError(f"{path}: text_tokens.config has {odd[0]}, which is not a special token")
    return TextTokens(**record)


def check_tokens(held: Mapping[str, Any], where: str, rows: int | None = None) -> None:
    """Check the values of `TOKEN_KEYS`.

    Args:
        rows: number of ids that the model has; None does not compare with it. Old Llamas have the pad token -1.

    Raises:
        CheckpointError: a value is not a token id, a list of them or null (the message names the key), or the nesting
            is too deep.
    """
    if _deeper_than(held, MAX_DEPTH):
        raise CheckpointError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    for key in TOKEN_KEYS:
        value = held.get(key)
        ids: list[Any] = [] if value is None else value if isinstance(value, list) and value else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise CheckpointError(
                f"{where}: {key} is {reprlib.repr(value)}; it must be a token id, a list of them or null"
            )
        low = -1 if key == "pad_token_id" else 0
        if rows is not None and (outside := [one for one in ids if not low <= one < rows]):
            raise CheckpointError(
                f"{where}: {key} has {outside[0]}, but the model has the ids 0 to {rows - 1}; correct it, or remove it"
            )


def _deeper_than(value: Any, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(_deeper_than(part, limit - 1) for part in parts)
