"""The `post_processor` of a `tokenizer.json`: the special tokens that a tokenizer puts around a text."""

import itertools
from typing import Any


def ids_before_text(processor: Any) -> tuple[int, ...]:
    """The ids that the `post_processor` of a `tokenizer.json` puts before a text."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence":
        return tuple(token for part in processor["processors"] for token in ids_before_text(part))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],)
    if kind != "TemplateProcessing":
        return ()
    before = itertools.takewhile(lambda piece: "SpecialToken" in piece, processor["single"])
    names = [piece["SpecialToken"]["id"] for piece in before]
    return tuple(token for name in names for token in processor["special_tokens"][name]["ids"])


def undefined_tokens(part: Any) -> set[str]:
    """Tokens that a template adds without defining them; the library would end the process with a panic."""
    if isinstance(part, list):
        return {token for inner in part for token in undefined_tokens(inner)}
    if not isinstance(part, dict):
        return set()
    if part.get("type") != "TemplateProcessing":
        return undefined_tokens(list(part.values()))
    pieces = (piece.get("SpecialToken") for key in ("single", "pair") for piece in part[key])
    return {piece["id"] for piece in pieces if piece is not None} - part["special_tokens"].keys()
