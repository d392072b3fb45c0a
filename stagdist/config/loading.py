"""Read and write configurations: YAML files, overrides from the command line, readable errors.

A file becomes a `RunConfig`, or one error that lists every problem by the path of its key. No other file is opened.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stagdist.config.base import ConfigPart
from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.config.schema import meaning, unknown
from stagdist.errors import ConfigError
from stagdist.files import not_downloaded


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Configuration of a run from a YAML file and overrides such as `training.steps=20`.

    Overrides are applied in order, their values are read as YAML, and a number in a path is the index of a list:
    `data.corpora.0.prefix=data/pile`.

    Raises:
        ConfigError: the file is missing, not YAML, or not a valid configuration; lists every problem, one per line.
    """
    config, problems = read_config(path, overrides)
    if problems or config is None:
        raise ConfigError(refusal(path, problems))
    return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[str]]:
    """As `load_config`, but returns the problems: a contradictory configuration is returned together with them.

    Returns: the configuration, or None if a key is unknown, missing or of the wrong type; every problem found.

    Raises:
        ConfigError: the file is missing or not YAML, or an override cannot be applied to it.
    """
    keys = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(keys, override)
    return validate(keys)


def validate(keys: Mapping[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """A configuration from nested mappings, with every problem found; None if a single key is wrong."""
    contradictions: list[str] = []  # filled by the checks instead of being raised
    try:
        config = RunConfig.model_validate(dict(keys), context=contradictions)
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        return None, [_readable(one) for one in unknown_first] + contradictions
    return config, contradictions


def validate_model(keys: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
    """As `validate`, for the model part alone; problems name its keys as in a run's configuration, `model.KEY`.

    Values must have the type of their key: "16" and 16.0 are not integers.
    """
    contradictions: list[str] = []
    try:
        return ModelConfig.model_validate(dict(keys), strict=True, context=contradictions), contradictions
    except ValidationError as error:
        return None, [_readable(one | {"loc": ("model", *one["loc"])}) for one in error.errors()]


def refusal(path: str | Path, problems: Sequence[str]) -> str:
    """One error message with the file and every problem."""
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return f"{path} has {len(problems)} problems:" + "".join(f"\n  - {problem}" for problem in problems)


def dump_config(config: RunConfig) -> str:
    """The complete configuration as YAML, with defaults; loading it again gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def differences(first: ConfigPart, second: ConfigPart) -> dict[str, tuple[Any, Any]]:
    """Paths of the keys in which two configurations (or the same part of two) differ, with both values.

    Null keys of the model are compared by their resolved values, so an explicit default is not a difference.
    """
    left, right = (dict(_leaves(_resolved(part).model_dump())) for part in (first, second))
    paths = list(left) + [path for path in right if path not in left]
    return {path: (left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)}


# ---- files and overrides ----


_INDEX = re.compile("[0-9]{1,9}")  # of a list
_MOST_SHOWN = 200
_MOST_NODES = 100_000
"""Keys and values of a file; a configuration has some hundreds."""


class _StrictLoader(yaml.SafeLoader):
    """YAML with 3e-4 as a number, as in YAML 1.2, without duplicate keys and aliases that multiply."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _expanded_size(node, {}) > _MOST_NODES:
            raise ConfigError(f"it holds more than {_MOST_NODES} keys and values, aliases written out")
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and key != "<<" and key in seen:
                raise ConfigError(f"key {key} is given twice, in line {seen[key]} and in line {line}; remove one")
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> Any:
        """A number, if it means the same without knowing YAML 1.1, where 010 is 8 and 1:30 is 90."""
        octal = node.tag.endswith("int") and re.match("[-+]?0[0-9_]", node.value)
        if octal or ":" in node.value:
            raise ConfigError(
                f"{node.value} in line {node.start_mark.line + 1} is octal or of base 60 in YAML; write a decimal "
                "number, or put text into quotes"
            )
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


def _expanded_size(node: yaml.Node, sizes: dict[yaml.Node, float]) -> float:
    """Number of nodes below a node and itself, with every alias written out; infinite if it contains itself."""
    if node not in sizes:
        sizes[node] = math.inf
        pairs = isinstance(node, yaml.MappingNode)
        below = chain.from_iterable(node.value) if pairs else node.value if isinstance(node, yaml.SequenceNode) else ()
        sizes[node] = 1 + sum(_expanded_size(one, sizes) for one in below)
    return sizes[node]


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_decimal)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: lists or mappings are nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{origin}{place}: not valid YAML: {problem}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # a number, date or tag
        raise ConfigError(f"{origin}: a value cannot be read: {error}; put text into quotes") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if problem := not_downloaded(path, text=True):
            raise ConfigError(problem)
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows may write a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; see configs/ for files to start from") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not UTF-8 ({error}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    keys = _parse_yaml(text, str(path))
    if not isinstance(keys, dict):
        raise ConfigError(f"{path} must hold keys such as `name: my-run`, got {type(keys).__name__}")
    return {str(name): value for name, value in keys.items()}


def shown(value: Any) -> str:
    """A value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _apply_override(keys: dict[str, Any], override: str) -> None:
    """Set one key, creating the mappings and list entries on its path."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {shown(override)} must look like key.path=value, for example training.steps=20")
    value = _parse_yaml(text, f"override {shown(override)}")
    place: Any = keys
    for depth, part in enumerate(parts):
        index = _place_of(place, part, here=".".join(parts[:depth]), override=override)
        if depth == len(parts) - 1:
            place[index] = value
        elif (place[index] if isinstance(place, list) else place.get(index)) is None:
            place[index] = [] if _INDEX.fullmatch(parts[depth + 1]) else {}
        place = place[index]


def _place_of(place: Any, part: str, *, here: str, override: str) -> Any:
    """The key of a mapping, or the index of a list, which may be extended by one entry."""
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise ConfigError(f"override {shown(override)}: {here} is {shown(place)} and has no keys; set {here} itself")
    if not _INDEX.fullmatch(part) or int(part) > len(place):
        raise ConfigError(
            f"override {shown(override)}: {here} has {len(place)} entries in the file, there is no entry {part}; "
            f"give the complete list as {here}=[...]"
        )
    if int(part) == len(place):
        place.append(None)
    return int(part)


# ---- readable problems ----

_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text (put it in quotes)",
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "a mapping of keys"),
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length} entries",
    "too_long": "a list of at most {max_length} entries",
    "string_too_short": "text of at least {min_length} character",
    "literal_error": "{expected}",
}
"""The expected value by the type of pydantic's error; braces are filled with values of the error."""


def _readable(error: Mapping[str, Any]) -> str:
    """A problem with the path of its key, without the vocabulary of the validation library."""
    names, kind = list(map(str, error["loc"])), error["type"]
    path = ".".join(names)
    if kind == "extra_forbidden":
        return unknown(".".join(names[:-1]), names[-1])
    if kind == "missing":
        return f"{path} is missing{meaning(path)}"
    if kind == "value_error":
        reason = str(error["ctx"]["error"])
        return f"{path} {reason}" if reason.startswith("is ") else reason
    expected = _EXPECTED.get(kind)
    if expected is None:
        return f"{path} is {shown(error['input'])}: {error['msg']}"
    return f"{path} is {shown(error['input'])}, must be {expected.format(**error.get('ctx', {}))}{meaning(path)}"


def _resolved(part: ConfigPart) -> ConfigPart:
    """The same part with the null keys of the model replaced by the values that they default to."""
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
    """Path and value of every key that holds neither a mapping nor a list of mappings."""
    if isinstance(value, tuple) and any(isinstance(entry, Mapping) for entry in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name, entry in value.items():
        yield from _leaves(entry, f"{path}.{name}" if path else str(name))
