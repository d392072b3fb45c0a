"""Every key of the configuration with its path, and the nearest name of an unknown key."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from stagdist.config.run_config import RunConfig


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        path: such as `optimizer.betas`; a list entry has the index `0`.
        schema: JSON schema of its value, with default and description.
        part: JSON schema of the part that it holds (directly, optionally or in a list); None for a plain value.
    """

    path: str
    schema: dict[str, Any]
    part: dict[str, Any] | None

    @property
    def is_list(self) -> bool:
        """Whether the key holds a list."""
        return self.schema.get("type") == "array"


@cache
def schema_keys() -> tuple[Key, ...]:
    """Every key in the order of definition."""
    root = RunConfig.model_json_schema()
    return tuple(_keys(root["properties"], root["$defs"], ""))


def _keys(properties: dict[str, Any], parts: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, schema in properties.items():
        inner = (schema, schema.get("items", {}), *schema.get("anyOf", ()))
        part = next((parts[one["$ref"].rpartition("/")[2]] for one in inner if "$ref" in one), None)
        key = Key(prefix + name, schema, part)
        yield key
        if part is not None:
            yield from _keys(part["properties"], parts, f"{key.path}.0." if key.is_list else f"{key.path}.")


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
    return next((f" ({key.schema['description'].rstrip('.')})" for key in schema_keys() if key.path in paths), "")


def _pattern(path: str) -> str:
    """A path as the schema has it: every entry of a list is entry 0."""
    return re.sub(r"\.\d+(?=\.|$)", ".0", path)
