"""The tokens that begin, end and fill texts, as a model directory states them: they go along when it is converted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagdist.checkpoint.model_config import read_body, read_json
from stagdist.errors import CheckpointError

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
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


def read_text_tokens(directory: Path) -> TextTokens | None:
    """Those of a model directory; None where it does not say how a text ends.

    Raises:
        CheckpointError: a file is damaged, or holds something that is no token, by the key.
    """
    body = read_body(directory)
    config = {key: body[key] for key in TOKEN_KEYS if key in body}
    path = directory / GENERATION
    generation = read_json(path) if path.is_file() else dict(config)
    for name, held in (("config.json", config), (GENERATION, generation)):
        for key in TOKEN_KEYS:
            if not _is_token(held.get(key)):
                raise CheckpointError(
                    f"{directory / name}: {key} is {held[key]!r}; it must be a token's number, a list of them or null"
                )
    ends = config.get("eos_token_id") is not None or generation.get("eos_token_id") is not None
    return TextTokens(config, generation) if ends else None


def _is_token(value: Any) -> bool:
    numbers = value if isinstance(value, list) and value else [value]
    return value is None or all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)
