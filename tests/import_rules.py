"""Rules for imports: they point down, have no cycles, and each framework is imported in its own places only."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A room may import rooms of a lower tier and itself, but no other room of its tier.
TIERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files"),
    ("config",),
    ("telemetry",),
    ("parallel",),
    ("planning", "model", "data"),
    ("checkpoint",),
    ("training", "decode", "evaluation", "cluster"),
    ("serving",),
)
ROOT_NAMES = {"", "__version__"}  # the package itself, which imports nothing
ALONE = "hf"  # copied into exported models: imports nothing of stagdist
HF_USERS = {"checkpoint", "training", "decode", "evaluation", "cluster"}

# Where each framework may be imported; a folder ends in a slash.
FENCES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("stagdist/training/", "stagdist/checkpoint/", "launch/", "benchmarks/"),
    "megatron": ("stagdist/model/megatron.py", "stagdist/data/"),
    "triton": ("stagdist/decode/kernels/",),
    "starlette": ("stagdist/serving/",),
    "uvicorn": ("stagdist/serving/",),
    "prometheus_client": ("stagdist/serving/",),
    "transformers": ("stagdist/data/tokenizer_files.py", "stagdist/checkpoint/", "stagdist/hf/", "benchmarks/"),
}
# Slow to import and needed by few commands: imported inside the functions that use them.
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
    """Every import of the Python files under root, including imports inside functions."""
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
    """Every node that runs when the module is loaded, that is, outside of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _when_loaded(child)


def _type_checking(tree: ast.Module) -> list[ast.If]:
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]


def _names(node: ast.AST, path: str) -> list[str]:
    """Absolute names of the modules that a node imports; `from a import b` counts as `a.b`, which may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.removesuffix(".py").split("/")[: -node.level]
            base = ".".join([*package, *filter(None, [base])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
        return [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def _called(function: ast.expr) -> str:
    """The last name of what is called."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(root: Path, found: list[Import]) -> list[str]:
    """Every import under root, of those found, that breaks a rule, with the rule."""
    problems = [problem for each in found for problem in (_upward(each), _outside_fence(each), _eager(each)) if problem]
    return problems + _module_cycles(root, found) + _room_cycles(root, found)


def _part(path_or_name: str) -> str:
    """The room of stagdist that a path or module belongs to: `model` for stagdist/model/head.py; `` for the root."""
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


def _module_cycles(root: Path, found: list[Import]) -> list[str]:
    """Modules of stagdist that import each other, for types too. Imports inside functions do not count."""
    return _cycles((each.path, target) for each, target in _edges(root, found) if each.at_top)


def _room_cycles(root: Path, found: list[Import]) -> list[str]:
    """Sub-rooms and modules of one room that import each other, in functions too.

    `stagdist/decode/engine.py` and `stagdist/decode/runtime/` are two units of the room `decode`.
    """
    units = ((_unit(each.path), _unit(target)) for each, target in _edges(root, found))
    pairs = [(one, other) for one, other in units if one.split("/")[1] == other.split("/")[1]]
    # A cycle of modules alone is reported by `_module_cycles`.
    return [cycle for cycle in _cycles(pairs) if "/ " in f"{cycle} "]


def _unit(path: str) -> str:
    """What a file of a room belongs to: its sub-room (`stagdist/decode/runtime/`) or itself."""
    pieces = path.split("/")
    return path if len(pieces) < 4 else "/".join(pieces[:3]) + "/"


def _edges(root: Path, found: list[Import]) -> Iterator[tuple[Import, str]]:
    """Every import of one file of stagdist by another, with the path of the imported file."""
    for each in found:
        target = _file(root, each.name) if each.path.startswith("stagdist/") else None
        if target and target != each.path and target.startswith("stagdist/"):
            yield each, target


def _cycles(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The cycles of a directed graph."""
    edges: dict[str, set[str]] = {}
    for one, other in pairs:
        if one != other:
            edges.setdefault(one, set()).add(other)
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
    """File of the module that an imported name is, or is defined in."""
    pieces = name.split(".")
    for count in (len(pieces), len(pieces) - 1):
        stem = "/".join(pieces[:count])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
            if (root / candidate).is_file():
                return candidate
    return None
