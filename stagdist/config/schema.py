"""Every key of the configuration with its path, and the nearest name of an unknown key."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from stagdist.config.base import ConfigPart
from stagdist.config.run_config import RunConfig


@dataclass(frozen=True)
class Key:
    """One key of the schema: its path such as `optimizer.betas`, and its field."""

    path: str
    field: FieldInfo


def schema_keys(part: type[ConfigPart] = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Every key of the schema in the order of definition; a list entry has the index `0`."""
    for name, field in part.model_fields.items():
        path = f"{prefix}{name}"
        yield Key(path, field)
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


def unknown(place: str, name: str) -> str:
    """The problem of an unknown key of the part at `place`: its nearest sibling, or key anywhere, or all siblings."""
    path = f"{place}.{name}".lstrip(".")
    places = {key.path: key.path.rpartition(".") for key in schema_keys()}
    siblings = {last: f"{place}.{last}".lstrip(".") for part, _, last in places.values() if part == _pattern(place)}
    elsewhere = {last: key for key, (_, _, last) in places.items()}
    for names, cutoff in ((siblings, 0.7), (elsewhere, 0.8), (siblings, 0.5)):
        if near := difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
            return f"unknown key {path}; did you mean {names[near[0]]}?"
    return f"unknown key {path}; {place or 'the configuration'} has: {', '.join(siblings)}"


def meaning(path: str) -> str:
    """The description of a key in parentheses, for messages about a missing or wrong value."""
    paths = (_pattern(path), _pattern(path).removesuffix(".0"))
    return next((f" ({(key.field.description or '').rstrip('.')})" for key in schema_keys() if key.path in paths), "")


def _pattern(path: str) -> str:
    """A path as the schema has it: every entry of a list is entry 0."""
    return re.sub(r"\.\d+(?=\.|$)", ".0", path)
