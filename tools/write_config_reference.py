"""Write docs/configuration.md from the schema in stagdist/config/: python tools/write_config_reference.py"""

import re
from pathlib import Path
from typing import Any

import yaml

from stagdist.config.run_config import OWNED_DEEPSPEED_KEYS
from stagdist.config.schema import schema_keys

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/write_config_reference.py from stagdist/config/; edit the schema, not this page. -->

A run is configured by one YAML file; `configs/` contains examples. Any key can be set on the command line:

```
deepspeed launch/pretrain.py --config configs/quickstart.yaml --set training.steps=100 --set data.seed=7
```

`--set` can be repeated. Its value is parsed as YAML, and a number in a path is the index of a list. An unknown key is
refused with the nearest known name, and all problems of a file are reported together. Numbers are decimal: `010` and
`1:30`, which YAML reads as 8 and 90, are refused.

Paths are relative to the folder in which the run is started. The files in `configs/` expect their corpus under `data/`,
for example `data/pile-neox.bin` and `.idx`; the comment at the top of each file shows how to prepare it.

`--dry-run [--world-size N]` prints the resolved configuration, the grid, the parameters of every section and stage,
the memory of a rank, and every reason why the run would not start. It needs neither processes nor GPUs:

```
python launch/pretrain.py --config configs/paper-stagformer-2x18-2.9b.yaml --dry-run --world-size 64
```

The exit code is 0 if the run would start and 2 if it would not. `parallel.device: auto` is planned as a CPU, which
keeps more activations; `--set parallel.device=cuda` plans for GPUs.

In the tables below, a key marked **required** has no default. `null` means no value, as in YAML.
"""

DEEPSPEED = """\
## `deepspeed`

All keys under `deepspeed` are passed to DeepSpeed unchanged, for example
`deepspeed: {comms_logger: {enabled: true}}`. ZeRO stage 1 is always enabled; it is the only stage that works with a
pipeline. The following keys are refused, because stagdist derives them from its own keys:

| key of DeepSpeed | set instead |
|---|---|
"""


def reference() -> str:
    """The page: a table for every part of the configuration."""
    tables: dict[str, list[str]] = {"": []}
    parts: dict[str, dict[str, Any]] = {}
    for key in schema_keys():
        place, _, name = key.path.rpartition(".")
        if key.part is not None:
            parts[f"{key.path}.0" if key.is_list else key.path] = key.part
        if key.part is None or key.is_list or key.schema.get("default", {}) is None:
            tables.setdefault(place, []).append(_row(name, key.schema))
    text = INTRODUCTION + "\n" + _table("## Run", "", tables.pop(""))
    described = set()
    for place, rows in tables.items():
        if parts[place]["title"] not in described:  # the lists of corpora share one table
            described.add(parts[place]["title"])
            text += _table(f"## {_title(place)}", parts[place]["description"], rows)
    return text + DEEPSPEED + "".join(f"| `{key}` | `{ours}` |\n" for key, ours in OWNED_DEEPSPEED_KEYS.items())


def _title(place: str) -> str:
    """Heading of a part: its path. The lists of corpora share one heading."""
    return "Entries of `data.corpora` and of the other lists of corpora" if place.endswith(".0") else f"`{place}`"


def _table(heading: str, meaning: str, rows: list[str]) -> str:
    paragraph = f"{meaning}\n\n" if meaning else ""
    return f"{heading}\n\n{paragraph}| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows) + "\n"


def _row(name: str, schema: dict[str, Any]) -> str:
    default = f"`{_as_yaml(schema['default'])}`" if "default" in schema else "**required**"
    cells = (f"`{name}`", type_words(schema), default, schema["description"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, float):
        return re.sub(r"e-0*", "e-", repr(value)).removesuffix(".0")
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def type_words(schema: dict[str, Any]) -> str:
    """The type of a value and its limits as text, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(type_words, schema["anyOf"]))
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return " or ".join(f"`{value}`" for value in values)
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])} of {type_words(schema['prefixItems'][0])}"
    if "items" in schema:
        return f"list of {type_words(schema['items'])}"
    if "minimum" in schema and "maximum" in schema:
        return f"{_WORDS[schema['type']]} {schema['minimum']} to {schema['maximum']}"
    limits = "".join(f" {sign} {schema[limit]:g}" for limit, sign in _LIMITS.items() if limit in schema)
    return _WORDS.get(schema.get("type", ""), "mapping") + limits


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
