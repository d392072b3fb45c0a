"""Every key of the configuration with its path, and the nearest name of an unknown key."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from stagdist.config.base import ConfigPart
from stagdist.config.run_config import RunConfig


@dataclass(frozen=True)
class Key:
    """One key of the schema: its path such as `optimizer.betas`, the part that contains it, and its field."""

    path: str
    owner: type[ConfigPart]
    field: FieldInfo


def schema_keys(part: type[ConfigPart] = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Every key of the schema in the order of definition; a list entry has the index `0`."""
    for name, field in part.model_fields.items():
        path = f"{prefix}{name}"
        yield Key(path, part, field)
        inner = inner_part(field)
        if inner is not None:
            yield from schema_keys(inner, f"{path}.0." if is_list(field) else f"{path}.")


def inner_part(field: FieldInfo) -> type[ConfigPart] | None:
    """The part of the configuration that a key holds (directly, optionally or in a list), None for a plain value."""
    waiting: list[Any] = [field.annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, ConfigPart):
            return kind
        waiting += get_args(kind)
    return None


def is_list(field: FieldInfo) -> bool:
    """True for a key that holds a list."""
    return getattr(field.annotation, "__origin__", None) is tuple


def unknown_keys(keys: Mapping[str, Any], part: type[ConfigPart] = RunConfig, prefix: str = "") -> list[str]:
    """One problem, with the nearest known name, for each key that is not in the schema."""
    problems = []
    for name, value in keys.items():
        field = part.model_fields.get(name)
        if field is None:
            problems.append(_unknown(f"{prefix}{name}", part, prefix))
        elif (inner := inner_part(field)) is not None:
            entries = [("", value)]
            if is_list(field) and isinstance(value, list):
                entries = [(f".{index}", entry) for index, entry in enumerate(value)]
            for index, entry in entries:
                if isinstance(entry, Mapping):
                    problems += unknown_keys(entry, inner, f"{prefix}{name}{index}.")
    return problems


def _unknown(path: str, part: type[ConfigPart], prefix: str) -> str:
    """The nearest sibling of an unknown key, or the nearest key anywhere, or all its siblings."""
    name = path.removeprefix(prefix)
    siblings = list(part.model_fields)
    near = [f"{prefix}{one}" for one in difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)]
    elsewhere = {key.path.rsplit(".", 1)[-1]: key.path for key in schema_keys()}
    near += [elsewhere[one] for one in difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)]
    near += [f"{prefix}{one}" for one in difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)]
    if near:
        return f"unknown key {path}; did you mean {near[0]}?"
    return f"unknown key {path}; {prefix.rstrip('.') or 'the configuration'} has: {', '.join(siblings)}"


def meaning(path: str) -> str:
    """The description of a key in parentheses, for messages about a missing or wrong value."""
    pattern = re.sub(r"\.\d+", ".0", path)
    for key in schema_keys():
        if key.path in (pattern, pattern.removesuffix(".0")):
            return f" ({(key.field.description or '').rstrip('.')})"
    return ""
