"""Imports point down only, and every framework stays behind its fence."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A part may import those of a lower tier and itself. Siblings of one tier do not know each other.
TIERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files"),
    ("config",),
    ("telemetry",),
    ("parallel",),
    ("planning", "model", "data"),
    ("checkpoint",),
    ("training", "decode", "evaluation", "cluster"),
)
ROOT_NAMES = {"", "__version__"}  # the package itself, which imports nothing
ALONE = "hf"  # travels with exported models: imports nothing of ours
HF_USERS = {"checkpoint", "training", "decode", "evaluation", "cluster"}

# Where each framework may appear; a folder ends in a slash.
FENCES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("stagdist/training/", "stagdist/checkpoint/", "launch/", "benchmarks/"),
    "megatron": ("stagdist/parallel/frameworks.py", "stagdist/data/"),
    "transformers": ("stagdist/data/tokenizer.py", "stagdist/checkpoint/", "stagdist/hf/", "benchmarks/"),
}
# Seconds to import and needed by few commands: only inside the functions that use them.
LAZY = {"wandb", "tensorboard", "matplotlib", "datasets", "torch.utils.tensorboard"}
FOLDERS = ("stagdist", "launch", "tools", "benchmarks")


@dataclass(frozen=True)
class Import:
    """One imported module, as written, with where and how."""

    name: str
    path: str
    line: int
    at_top: bool
    only_types: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def imports_below(root: Path) -> list[Import]:
    """Every import of the Python files under root, in functions too."""
    found: list[Import] = []
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text())
        at_top = set(map(id, _when_loaded(tree)))
        only_types = {id(node) for block in _type_checking(tree) for node in ast.walk(block)}
        for node in ast.walk(tree):
            for name in _names(node, relative):
                found.append(Import(name, relative, node.lineno, id(node) in at_top, id(node) in only_types))  # type: ignore[attr-defined]
    return found


def _when_loaded(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node that runs when the module is loaded, that is outside of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _when_loaded(child)


def _type_checking(tree: ast.Module) -> list[ast.If]:
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]


def _names(node: ast.AST, path: str) -> list[str]:
    """Absolute names of the modules that a node imports; `from a import b` counts as `a.b`, which it may be."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.removesuffix(".py").split("/")[: -node.level]
            base = ".".join([*package, *filter(None, [base])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def violations(root: Path) -> list[str]:
    """Every import under root that breaks a rule, with the rule."""
    found = imports_below(root)
    problems = [problem for each in found for problem in (_upward(each), _outside_fence(each), _eager(each)) if problem]
    return problems + _cycles(root, found)


def _part(path_or_name: str) -> str:
    """The part of stagdist that a path or module belongs to: `model` for stagdist/model/head.py; `` for the root."""
    pieces = path_or_name.removesuffix(".py").removesuffix("/__init__").replace("/", ".").split(".")
    return pieces[1] if len(pieces) > 1 else ""


def _tier(part: str) -> int | None:
    return next((level for level, parts in enumerate(TIERS) if part in parts), None)


def _upward(each: Import) -> str | None:
    if not each.path.startswith("stagdist/") or each.name.split(".")[0] != "stagdist":
        return None
    importer, imported = _part(each.path), _part(each.name)
    if importer == imported or imported in ROOT_NAMES:
        return None
    if importer == ALONE:
        return f"{each}: {ALONE} imports nothing of stagdist"
    if imported == ALONE:
        return None if importer in HF_USERS else f"{each}: only {sorted(HF_USERS)} use {ALONE}"
    above, below = _tier(importer), _tier(imported)
    if above is None or below is None:
        return f"{each}: give {importer or 'stagdist/__init__.py'} and {imported or 'stagdist itself'} a tier"
    return None if below < above else f"{each}: {importer} is not above {imported}"


def _outside_fence(each: Import) -> str | None:
    allowed = FENCES.get(each.name.split(".")[0])
    if allowed is None or any(
        each.path == place or (place[-1] == "/" and each.path.startswith(place)) for place in allowed
    ):
        return None
    return f"{each}: allowed in {', '.join(allowed)} only"


def _eager(each: Import) -> str | None:
    if not each.at_top or each.only_types or not any(f"{each.name}.".startswith(f"{name}.") for name in LAZY):
        return None
    return f"{each}: import it inside the function that needs it"


def _cycles(root: Path, found: list[Import]) -> list[str]:
    """Modules of stagdist that import each other when they are loaded."""
    edges: dict[str, set[str]] = {}
    for each in found:
        if each.at_top and not each.only_types and each.path.startswith("stagdist/"):
            target = _file(root, each.name)
            if target and target != each.path:
                edges.setdefault(each.path, set()).add(target)
    done: set[str] = set()
    problems: list[str] = []

    def visit(path: str, trail: list[str]) -> None:
        if path in trail:
            problems.append("import cycle: " + " -> ".join([*trail[trail.index(path) :], path]))
        elif path not in done:
            for target in sorted(edges.get(path, ())):
                visit(target, [*trail, path])
            done.add(path)

    for path in sorted(edges):
        visit(path, [])
    return problems


def _file(root: Path, name: str) -> str | None:
    """File of the module that an imported name is or lies in."""
    pieces = name.split(".")
    for count in (len(pieces), len(pieces) - 1):
        stem = "/".join(pieces[:count])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
            if (root / candidate).is_file():
                return candidate
    return None


# --- the repository ---------------------------------------------------------------------------------------------


def test_imports_of_the_repository_keep_the_rules() -> None:
    assert violations(ROOT) == []


def test_the_checker_reads_the_whole_repository() -> None:
    seen = {each.path for each in imports_below(ROOT)}
    assert {"stagdist/config/parts.py", "stagdist/parallel/grid.py", "stagdist/model/megatron.py"} <= seen


def test_reading_a_configuration_imports_no_framework() -> None:
    code = (
        "import sys, stagdist.config.loading; print([n for n in ('torch', 'deepspeed', 'numpy') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


# --- the checker itself, on small trees -------------------------------------------------------------------------


def check(tmp_path: Path, files: dict[str, str]) -> list[str]:
    """Violations of a tree given as path and source."""
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return violations(tmp_path)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("stagdist/training/trainer.py", "import deepspeed\nfrom stagdist.model.section import Section"),
        ("stagdist/parallel/frameworks.py", "from megatron.core import tensor_parallel"),
        ("stagdist/data/corpus.py", "def read():\n    from datasets import load_dataset"),
        ("stagdist/config/loading.py", "from stagdist.config.run_config import RunConfig"),
        ("stagdist/checkpoint/export.py", "from stagdist.hf import modeling\nimport transformers"),
        ("stagdist/hf/modeling.py", "import transformers\nfrom .configuration import Config"),
        ("launch/pretrain.py", "import deepspeed\nfrom stagdist.training import trainer"),
        ("stagdist/telemetry/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import wandb"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, place: str, source: str) -> None:
    assert check(tmp_path, {place: source}) == []


@pytest.mark.parametrize(
    ("place", "source", "problem"),
    [
        ("stagdist/errors.py", "import stagdist.config", "errors is not above config"),
        ("stagdist/config/parts.py", "from stagdist.telemetry import logging", "config is not above telemetry"),
        ("stagdist/model/head.py", "from stagdist.training import trainer", "model is not above training"),
        ("stagdist/model/head.py", "from stagdist.data import loader", "model is not above data"),
        ("stagdist/data/loader.py", "def f():\n    import stagdist.checkpoint", "data is not above checkpoint"),
        ("stagdist/decode/engine.py", "from stagdist import training", "decode is not above training"),
        ("stagdist/decode/engine.py", "from ..training import trainer", "decode is not above training"),
        ("stagdist/model/a.py", "if TYPE_CHECKING:\n    import stagdist.decode.x", "model is not above decode"),
        ("stagdist/novel/part.py", "import stagdist.errors", "give novel"),
        ("stagdist/__init__.py", "from stagdist.config import RunConfig", "give stagdist/__init__.py"),
        ("stagdist/hf/modeling.py", "from stagdist.errors import ConfigError", "hf imports nothing of stagdist"),
        ("stagdist/model/head.py", "from stagdist.hf import modeling", "use hf"),
        ("stagdist/model/section.py", "import deepspeed.pipe", "allowed in stagdist/training/"),
        ("tools/convert.py", "from deepspeed import checkpoint", "allowed in stagdist/training/"),
        ("stagdist/model/section.py", "from megatron.core import x", "allowed in stagdist/parallel/frameworks.py"),
        (
            "stagdist/parallel/grid.py",
            "def f():\n    import megatron.core",
            "allowed in stagdist/parallel/frameworks.py",
        ),
        ("stagdist/decode/x.py", "import importlib\nimportlib.import_module('deepspeed')", "allowed in"),
        ("stagdist/training/x.py", "from transformers import AutoTokenizer", "allowed in stagdist/data/tokenizer.py"),
        ("stagdist/telemetry/x.py", "import wandb", "inside the function"),
        ("stagdist/telemetry/x.py", "try:\n    import matplotlib.pyplot\nexcept ImportError:\n    pass", "inside the"),
        ("stagdist/telemetry/x.py", "try:\n    x = 1\nexcept OSError:\n    import datasets", "inside the function"),
        ("stagdist/telemetry/x.py", "from torch.utils.tensorboard import SummaryWriter", "inside the function"),
    ],
)
def test_forbidden_imports_are_reported(tmp_path: Path, place: str, source: str, problem: str) -> None:
    (found,) = check(tmp_path, {place: source})
    assert found.startswith(f"{place}:")
    assert problem in found


def test_cycles_inside_a_part_are_reported(tmp_path: Path) -> None:
    problems = check(
        tmp_path,
        {
            "stagdist/model/a.py": "from stagdist.model.b import one",
            "stagdist/model/b.py": "from stagdist.model.c import two",
            "stagdist/model/c.py": "from stagdist.model import a",
        },
    )
    assert problems == [
        "import cycle: stagdist/model/a.py -> stagdist/model/b.py -> stagdist/model/c.py -> stagdist/model/a.py"
    ]


def test_an_import_inside_a_function_makes_no_cycle(tmp_path: Path) -> None:
    assert not check(
        tmp_path,
        {
            "stagdist/model/a.py": "from stagdist.model.b import one",
            "stagdist/model/b.py": "def two():\n    from stagdist.model.a import one",
        },
    )
