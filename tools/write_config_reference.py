"""Write docs/configuration.md from the schema in stagdist/config/.

python tools/write_config_reference.py            writes the page
python tools/write_config_reference.py --check    exits with code 1 if the page is not up to date
"""

import argparse
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from stagdist.config.base import ConfigPart
from stagdist.config.run_config import OWNED_DEEPSPEED_KEYS
from stagdist.config.schema import Key, inner_part, is_list, schema_keys

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/write_config_reference.py from stagdist/config/; edit the schema, not this page. -->

A run is configured by one YAML file; `configs/` contains examples. Any key can be set on the command line:

```
deepspeed launch/pretrain.py --config configs/quickstart.yaml --set training.steps=100 --set data.seed=7
```

`--set` can be repeated. Its value is parsed as YAML, and a number in a path is the index of a list. An unknown key is
refused with the nearest known name, and all problems of a file are reported together.

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


def main() -> int:
    """Write or compare the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    if not arguments.check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(reference(), encoding="utf-8")
        return 0
    current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == reference()
    if not current:
        sys.stderr.write(f"{PAGE.name} is not up to date; run: python tools/write_config_reference.py\n")
    return 0 if current else 1


def reference() -> str:
    """The page: a table for every part of the configuration."""
    tables: dict[str, list[str]] = {"": []}
    meanings: dict[str, tuple[str, type[ConfigPart]]] = {}
    for key in schema_keys():
        part, _, name = key.path.rpartition(".")
        inner = inner_part(key.field)
        if inner is not None:
            meanings[f"{key.path}.0" if is_list(key.field) else key.path] = (key.field.description or "", inner)
        if inner is None or is_list(key.field) or key.field.default is None:
            tables.setdefault(part, []).append(_row(name, key))
    text = INTRODUCTION + "\n" + _table("## Run", "", tables.pop(""))
    described: set[type[ConfigPart]] = set()
    for part, rows in tables.items():
        description, inner = meanings[part]
        if inner not in described:  # the lists of corpora share one table
            described.add(inner)
            text += _table(f"## {_title(part)}", (inner.__doc__ or description).strip(), rows)
    return text + DEEPSPEED + "".join(f"| `{key}` | `{ours}` |\n" for key, ours in OWNED_DEEPSPEED_KEYS.items())


def _title(part: str) -> str:
    """Heading of a part: its path. The lists of corpora share one heading."""
    return "Entries of `data.corpora` and of the other lists of corpora" if part.endswith(".0") else f"`{part}`"


def _table(heading: str, meaning: str, rows: list[str]) -> str:
    paragraph = f"{meaning}\n\n" if meaning else ""
    return f"{heading}\n\n{paragraph}| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows) + "\n"


def _row(name: str, key: Key) -> str:
    cells = (f"`{name}`", type_words(key.field.annotation, key.field.metadata), _default(key), key.field.description)
    return "| " + " | ".join((cell or "").replace("|", "\\|") for cell in cells) + " |\n"


def _default(key: Key) -> str:
    default = key.field.get_default()
    if default is PydanticUndefined:
        return "**required**"
    if isinstance(default, tuple):
        return f"`[{', '.join(_as_yaml(entry) for entry in default)}]`"
    return f"`{_as_yaml(default)}`"


def _as_yaml(value: Any) -> str:
    if isinstance(value, float):
        return re.sub(r"e-0*", "e-", repr(value)).removesuffix(".0")
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


_PLAIN_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


def type_words(kind: Any, metadata: list[Any]) -> str:
    """The type of a key and its limits as text."""
    origin, inner = get_origin(kind), get_args(kind)
    if hasattr(kind, "__metadata__"):  # Annotated
        return type_words(kind.__origin__, [*kind.__metadata__, *metadata])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(one, metadata if one is not type(None) else []) for one in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"list of {type_words(inner[0], [])}"
    if origin is tuple:
        return f"list of {len(inner)} of {type_words(inner[0], [])}"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, ConfigPart)):
        return "mapping"
    return _PLAIN_WORDS[kind] + _limits(metadata)


def _limits(metadata: list[Any]) -> str:
    """Limits of a number, from pydantic's constraints at any depth."""
    found: dict[str, float] = {}
    for one in metadata:
        for constraint in [one, *getattr(one, "metadata", [])]:
            for sign in ("ge", "gt", "le", "lt"):
                if getattr(constraint, sign, None) is not None:
                    found[sign] = getattr(constraint, sign)
    if "ge" in found and "le" in found:
        return f" {found['ge']:g} to {found['le']:g}"
    words = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return "".join(f" {words[sign]} {limit:g}" for sign, limit in sorted(found.items()))


if __name__ == "__main__":
    raise SystemExit(main())
