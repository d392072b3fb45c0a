"""The tokens that begin, end and fill texts, as a model directory states them: they go along when it is converted.

No torch: the state of a training checkpoint, which has them too, is read without it.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagdist.errors import CheckpointError

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_DEPTH = 20
"""Of what a file of settings may hold within each other; it is copied by recursion."""

GENERATION = "generation_config.json"
"""What `transformers` generates with unless told otherwise."""


@dataclass(frozen=True)
class TextTokens:
    """What two files say.

    Attributes:
        config: those of `TOKEN_KEYS` that `config.json` has.
        generation: the content of `generation_config.json`.
    """

    config: dict[str, Any]
    generation: dict[str, Any]


def tokens_of(end_of_document: int) -> TextTokens:
    """Those of a tokenizer of ours: rows of a batch that have ended are filled up with the same token."""
    return TextTokens(
        {"bos_token_id": None, "eos_token_id": end_of_document},
        {"eos_token_id": end_of_document, "pad_token_id": end_of_document},
    )


def recorded_tokens(record: Any, path: Path) -> TextTokens | None:
    """Those that `state.json` of a training checkpoint holds; None where it holds none.

    Args:
        record: what it holds.
        path: of the file, for errors.

    Raises:
        CheckpointError: it is something else, by the key.
    """
    if record is None:
        return None
    if not isinstance(record, dict) or set(record) != {"config", "generation"}:
        raise CheckpointError(f"{path}: text_tokens is {reprlib.repr(record)}; config and generation are needed")
    for part, held in record.items():
        if not isinstance(held, dict):
            raise CheckpointError(f"{path}: text_tokens.{part} is {reprlib.repr(held)}; keys with values are needed")
        check_tokens(held, f"{path}: text_tokens.{part}")
    if odd := sorted(set(record["config"]) - set(TOKEN_KEYS)):
        raise CheckpointError(f"{path}: text_tokens.config has {odd[0]}, which is no token")
    return TextTokens(**record)


def check_tokens(held: Mapping[str, Any], where: str) -> None:
    """Compare the values of `TOKEN_KEYS` with what tokens can be.

    Raises:
        CheckpointError: one cannot be, by the key; or something is nested too deeply.
    """
    if _deeper_than(held, MAX_DEPTH):
        raise CheckpointError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    for key in TOKEN_KEYS:
        if not _is_token(held.get(key)):
            raise CheckpointError(
                f"{where}: {key} is {reprlib.repr(held[key])}; it must be a token's number, a list or null"
            )


def _is_token(value: Any) -> bool:
    numbers = value if isinstance(value, list) and value else [value]
    return value is None or all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)


def _deeper_than(value: Any, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(_deeper_than(part, limit - 1) for part in parts)
