"""Size, names and documentation of the code: what keeps it readable."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("stagdist", "launch", "tools", "benchmarks", "tests")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
VAGUE = ("util", "manager", "helper")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path, *folders: str) -> Iterator[tuple[str, str]]:
    """Path below root and text of every Python file."""
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        yield path.relative_to(root).as_posix(), path.read_text()


def long_files(root: Path) -> list[str]:
    """Files above the limit."""
    counts = {path: len(text.splitlines()) for path, text in sources(root, *FOLDERS)}
    return [
        f"{path}: {lines} lines, at most {MAX_FILE_LINES}" for path, lines in counts.items() if lines > MAX_FILE_LINES
    ]


def long_functions(root: Path) -> list[str]:
    """Functions above the limit, docstring not counted."""
    found = []
    for path, text in sources(root, *FOLDERS):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function) and (lines := _length(node)) > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}")
    return found


def _length(function: Function) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def vague_names(root: Path) -> list[str]:
    """Modules and folders whose name says nothing about what they hold."""
    return [
        f"{path}: name it for what it holds"
        for path, _ in sources(root, *FOLDERS)
        if any(word in piece for piece in path.removesuffix(".py").lower().split("/") for word in VAGUE)
    ]


def undocumented(root: Path) -> list[str]:
    """Modules (an empty package file aside), public classes, functions and methods of stagdist without a docstring."""
    found = []
    for path, text in sources(root, "stagdist"):
        tree = ast.parse(text)
        if not ast.get_docstring(tree) and not (path.endswith("__init__.py") and not text.strip()):
            found.append(f"{path}: the module has no docstring")
        found += [f"{path}:{node.lineno} {name}: no docstring" for node, name in _bare(tree.body, "")]
    return found


def _bare(body: list[ast.stmt], prefix: str) -> Iterator[tuple[ast.stmt, str]]:
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not _is_variant(node):
            yield node, prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _bare(node.body, f"{prefix}{node.name}.")


def _is_variant(node: Function | ast.ClassDef) -> bool:
    """Setters and overloads are documented by the function they belong to."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(name.endswith((".setter", "overload", "override")) for name in decorators)


def global_statements(root: Path) -> list[str]:
    """Functions that rebind a module's names: state that hides from the caller."""
    return [
        f"{path}:{node.lineno}: global {', '.join(node.names)}"
        for path, text in sources(root, "stagdist", "launch", "tools")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Global)
    ]


RULES = (long_files, long_functions, vague_names, undocumented, global_statements)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


def test_the_rules_read_the_whole_repository() -> None:
    seen = {path for path, _ in sources(ROOT, *FOLDERS)}
    assert {"stagdist/config/parts.py", "stagdist/errors.py", "tests/test_house_rules.py"} <= seen


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("tools/long.py", "\n" * 501, ["tools/long.py: 501 lines, at most 500"]),
        ("tools/fits.py", "\n" * 500, []),
        ("tests/f.py", "def f():\n" + "    x = 1\n" * 60, ["tests/f.py:1 f: 61 lines, at most 60"]),
        ("tests/f.py", 'def f():\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * 59, []),
        ("stagdist/model/utils.py", '"""Doc."""\n', ["stagdist/model/utils.py: name it for what it holds"]),
        ("stagdist/helpers/a.py", '"""Doc."""\n', ["stagdist/helpers/a.py: name it for what it holds"]),
        ("stagdist/a.py", "", ["stagdist/a.py: the module has no docstring"]),
        ("stagdist/a/__init__.py", "", []),
        ("stagdist/a/__init__.py", "x = 1\n", ["stagdist/a/__init__.py: the module has no docstring"]),
        ("stagdist/a.py", '"""Doc."""\ndef f(): ...\n', ["stagdist/a.py:2 f: no docstring"]),
        (
            "stagdist/a.py",
            '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...\n',
            ["stagdist/a.py:4 A.f: no docstring"],
        ),
        ("stagdist/a.py", '"""Doc."""\ndef _f(): ...\nclass _A:\n    def g(self): ...\n', []),
        ("launch/a.py", "def f():\n    global x, y\n    x = 1\n", ["launch/a.py:2: global x, y"]),
    ],
)
def test_breaking_a_rule_is_noticed(tmp_path: Path, path: str, text: str, expected: list[str]) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert [problem for rule in RULES for problem in rule(tmp_path)] == expected
