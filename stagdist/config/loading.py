"""Reading and writing configurations: YAML files, overrides on the command line, errors in plain words.

What may be configured is said in `stagdist/config.py`; this module turns a file into a `RunConfig`, names every
problem at once by the path of its key, and writes a configuration back. It opens no file but the one it is given.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from stagdist.config.parts import ConfigPart, ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.config.schema import meaning, unknown_keys
from stagdist.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Configuration of a run from a YAML file and overrides such as `training.steps=20`.

    Overrides are applied in order, their values are read as YAML, and a number in a path is the index of a list:
    `data.corpora.0.prefix=data/pile`.

    Raises:
        ConfigError: the file is missing or is no YAML, or with every problem of the configuration, one per line.
    """
    config, problems = read_config(path, overrides)
    if problems or config is None:
        raise ConfigError(refusal(path, problems))
    return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[str]]:
    """As `load_config`, but hands the problems back: an inconsistent configuration comes with its problems.

    Returns: the configuration, None where some key is unknown, missing or of a wrong kind; every problem found.

    Raises:
        ConfigError: the file is missing or no YAML, or an override has no place in it.
    """
    keys = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(keys, override)
    return validate(keys)


def validate(keys: Mapping[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """A configuration from nested mappings, with every problem found; None where a single key is already wrong."""
    unknown = unknown_keys(keys)
    contradictions: list[str] = []  # filled by the cross-checks of stagdist/config.py instead of being raised
    try:
        config = RunConfig.model_validate(dict(keys), context=contradictions)
    except ValidationError as error:
        wrong = [_in_plain_words(one) for one in error.errors() if one["type"] != "extra_forbidden"]
        return None, unknown + wrong + contradictions
    return config, contradictions


def validate_model(keys: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
    """As `validate`, for the shape of a model alone; problems name keys as a run's configuration does."""
    contradictions: list[str] = []
    try:
        return ModelConfig.model_validate(dict(keys), context=contradictions), contradictions
    except ValidationError as error:
        return None, [_in_plain_words(one | {"loc": ("model", *one["loc"])}) for one in error.errors()]


def refusal(path: str | Path, problems: Sequence[str]) -> str:
    """One message that names the file and every problem."""
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return f"{path} has {len(problems)} problems:" + "".join(f"\n  - {problem}" for problem in problems)


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included; reading it again gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def differences(first: ConfigPart, second: ConfigPart) -> dict[str, tuple[Any, Any]]:
    """Paths of the keys in which two configurations (or two equal parts of them) differ, with both values.

    Keys of the model that are null are compared by what they stand for, so writing a default out is no difference.
    """
    left, right = dict(_leaves(_resolved(first))), dict(_leaves(_resolved(second)))
    paths = list(left) + [path for path in right if path not in left]
    return {path: (left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)}


# ---- files and overrides ----


class _StrictLoader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as in YAML 1.2, and a key may not be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and key != "<<" and key in seen:
                raise ConfigError(f"key {key} is given twice, in line {seen[key]} and in line {line}; remove one")
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)  # it is a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: lists or mappings are nested too deeply to be read") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; see configs/ for files to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    keys = _parse_yaml(text, str(path))
    if not isinstance(keys, dict):
        raise ConfigError(f"{path} must hold keys such as `name: my-run`, got {type(keys).__name__}")
    return {str(name): value for name, value in keys.items()}


def _apply_override(keys: dict[str, Any], override: str) -> None:
    """Set one key, making the mappings and list entries on the way to it."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} must look like key.path=value, for example training.steps=20")
    value = _parse_yaml(text, f"override {override!r}")
    place: Any = keys
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        below: Any = value if last else ([] if parts[depth + 1].isdigit() else {})
        place = _enter(place, part, below, replace=last, here=here, override=override)


def _enter(place: Any, part: str, below: Any, *, replace: bool, here: str, override: str) -> Any:
    """What `part` of a mapping or list holds, after putting `below` there if nothing is or `replace` says so."""
    index: Any = part
    if isinstance(place, list):
        if not part.isdigit() or int(part) > len(place):
            raise ConfigError(
                f"override {override!r}: {here} has {len(place)} entries in the file, there is no entry {part}; "
                f"give the whole list as {here}=[...]"
            )
        index = int(part)
        if index == len(place):
            place.append(None)
    elif not isinstance(place, dict):
        raise ConfigError(f"override {override!r}: {here} is {place!r} and has no keys; set {here} itself")
    held = place[index] if isinstance(place, list) else place.get(part)
    if replace or held is None:
        place[index] = held = below
    return held


# ---- problems in plain words ----

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length} entries",
    "too_long": "a list of at most {max_length} entries",
    "string_too_short": "text of at least {min_length} character",
    "literal_error": "{expected}",
}
"""What a key must hold, by the kind of pydantic's error; the words in braces are the error's own values."""


def _in_plain_words(error: Mapping[str, Any]) -> str:
    """A problem by the path of its key, without the words of the validation library."""
    path, kind = ".".join(str(part) for part in error["loc"]), error["type"]
    if kind == "missing":
        return f"{path} is missing{meaning(path)}"
    if kind == "value_error":
        reason = str(error["ctx"]["error"])
        return f"{path} {reason}" if reason.startswith("is ") else reason
    expected = _EXPECTED.get(kind)
    if expected is None:
        return f"{path} is {error['input']!r}: {error['msg']}"
    return f"{path} is {error['input']!r}, must be {expected.format(**error.get('ctx', {}))}{meaning(path)}"


def _resolved(part: ConfigPart) -> ConfigPart:
    """The same part with those nulls of the model filled in that stand for a value of another key."""
    if isinstance(part, RunConfig):
        return part.model_copy(update={"model": _resolved(part.model)})
    if isinstance(part, ModelConfig):
        heads = {
            "num_key_value_heads": part.key_value_heads,
            "cross_attention_key_value_heads": part.cross_key_value_heads if part.staggered else None,
            "head_dim": part.head_width,
        }
        return part.model_copy(update=heads)
    return part


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything that is neither a mapping nor a list of mappings."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    entries: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, tuple) and any(isinstance(entry, BaseModel) for entry in value):
        entries = list(enumerate(value))
    if not entries:
        yield path, value
    for name, entry in entries:
        yield from _leaves(entry, f"{path}.{name}" if path else str(name))
