"""Rules for the size, names, documentation and language of the code. Each returns one line per violation."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("stagdist", "launch", "tools", "benchmarks")
FOLDERS = (*PRODUCT, "tests")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
LONG_FUNCTION_LINES = 40
MAX_LONG_FUNCTIONS = 8
MAX_FILES_IN_FOLDER = 12
VAGUE = ("util", "manager", "helper")

IDIOMS = re.compile(
    r"\b(told|tells|whole|nobody|a person|mend|mends|mended|besides|goes on|going on|strangers?|sisters?)\b", re.I
)
"""Words that a reader has to translate. Write: reports, complete, no one or no process, the user, fix, in addition,
continues, and so on."""

# Modules or classes of one name in different rooms that are the same thing there, with the reason.
SAME_MODULES: dict[str, str] = {}
SAME_CLASSES: dict[str, str] = {}

SLACK = 0.10
"""A room that falls below its number by more than this share needs a smaller number."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path, *folders: str, suffixes: Sequence[str] = (".py",)) -> Iterator[tuple[str, str]]:
    """Path below root and text of every file with one of these suffixes."""
    paths = (path for folder in folders for path in (root / folder).rglob("*") if path.suffix in suffixes)
    for path in sorted(paths):
        yield path.relative_to(root).as_posix(), path.read_text()


# ---- size ----


def long_files(root: Path) -> list[str]:
    """Files of Python or C++ above the limit."""
    counted = sources(root, *FOLDERS, suffixes=(".py", ".cpp", ".h"))
    counts = {path: len(text.splitlines()) for path, text in counted}
    return [
        f"{path}: {lines} lines, at most {MAX_FILE_LINES}" for path, lines in counts.items() if lines > MAX_FILE_LINES
    ]


def long_functions(root: Path) -> list[str]:
    """Functions above the limit, and all that are nearly as long where there are too many. Docstrings do not count."""
    found: list[str] = []
    nearly: list[str] = []
    for path, text in sources(root, *FOLDERS):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, Function):
                continue
            lines = _length(node)
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}")
            elif lines > LONG_FUNCTION_LINES and not path.startswith("tests/"):
                nearly.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    if len(nearly) > MAX_LONG_FUNCTIONS:
        limits = f"more than {LONG_FUNCTION_LINES} lines, at most {MAX_LONG_FUNCTIONS} may"
        found.append(f"{len(nearly)} functions have {limits}: {'; '.join(nearly)}")
    return found


def _length(function: Function) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def full_folders(root: Path) -> list[str]:
    """Folders with more Python files at one level than a reader can survey."""
    files: dict[str, int] = defaultdict(int)
    for path, _ in sources(root, *PRODUCT):
        folder, _, name = path.rpartition("/")
        files[folder] += name != "__init__.py"
    return [
        f"{folder}: {count} files, at most {MAX_FILES_IN_FOLDER}; open a sub-room"
        for folder, count in files.items()
        if count > MAX_FILES_IN_FOLDER
    ]


def lines_by_room(root: Path) -> dict[str, int]:
    """Lines of Python in each room."""
    counts: dict[str, int] = defaultdict(int)
    for path, text in sources(root, *PRODUCT):
        pieces = path.split("/")
        room = "/".join(pieces[:2]) if pieces[0] == "stagdist" else pieces[0]
        if room != "stagdist/__init__.py":
            counts[room] += len(text.splitlines())
    return counts


def over_or_under_budget(
    counts: Mapping[str, int], budgets: Mapping[str, int], limits: Mapping[tuple[str, ...], int]
) -> list[str]:
    """Rooms whose size left their budget, and sums of rooms above their limit."""
    found = []
    for room in sorted(counts.keys() | budgets.keys()):
        lines, budget = counts.get(room, 0), budgets.get(room, 0)
        entry = f'"{room}": {lines}' if lines else f'no entry "{room}"'
        advice = f"write {entry} into BUDGETS of tests/test_house_rules.py if this is intended"
        if lines > budget:
            found.append(f"{room}: {lines} lines, {lines - budget} above its budget; shorten it, or {advice}")
        elif lines < (1 - SLACK) * budget:
            found.append(f"{room}: {lines} lines, {budget - lines} below its budget; to keep what was gained, {advice}")
    for folders, limit in limits.items():
        total = sum(lines for room, lines in counts.items() if room.split("/")[0] in folders)
        if total > limit:
            found.append(f"{' + '.join(folders)}: {total} lines in all, at most {limit}")
    return found


# ---- names ----


def vague_names(root: Path) -> list[str]:
    """Modules and folders whose name does not say what they contain."""
    return [
        f"{path}: name it for what it holds"
        for path, _ in sources(root, *FOLDERS)
        if any(word in piece for piece in path.removesuffix(".py").lower().split("/") for word in VAGUE)
    ]


def repeated_names(root: Path) -> list[str]:
    """Modules, and public classes, of stagdist that share their name."""
    modules, classes = defaultdict(list), defaultdict(list)
    for path, text in sources(root, "stagdist"):
        stem = path.rpartition("/")[2].removesuffix(".py")
        if stem != "__init__":
            modules[stem].append(path)
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(path)
    return [
        f"{kind} {name} is in {' and '.join(paths)}; rename all but one, or add it to {allowed} with the reason"
        for kind, found, known, allowed in (
            ("module", modules, SAME_MODULES, "SAME_MODULES"),
            ("class", classes, SAME_CLASSES, "SAME_CLASSES"),
        )
        for name, paths in found.items()
        if len(paths) > 1 and name not in known
    ]


def global_statements(root: Path) -> list[str]:
    """Functions that rebind a module's names: state that hides from the caller."""
    return [
        f"{path}:{node.lineno}: global {', '.join(node.names)}"
        for path, text in sources(root, "stagdist", "launch", "tools")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Global)
    ]


# ---- documentation and language ----


def undocumented(root: Path) -> list[str]:
    """Modules (except an empty package file), public classes, functions and methods of stagdist without a docstring."""
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


def idioms(root: Path) -> list[str]:
    """Words of `IDIOMS` in docstrings, comments and strings of the product, and in Markdown. Backticks are exempt."""
    prose = [(path, _strings_and_comments(text)) for path, text in sources(root, *PRODUCT)]
    markdown = sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])
    prose += [(path.relative_to(root).as_posix(), path.read_text()) for path in markdown]
    return [
        f"{path}:{number}: {match[0]!r} in {line.strip()!r}"
        for path, text in prose
        for number, line in enumerate(text.splitlines(), 1)
        if (match := IDIOMS.search(re.sub(r"`[^`]*`", "``", line)))
    ]


def _strings_and_comments(text: str) -> str:
    """The source with everything blanked that is neither a string nor a comment; lines keep their numbers."""
    lines = [""] * (text.count("\n") + 2)
    prose = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.COMMENT)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in prose:
            for offset, line in enumerate(token.string.splitlines()):
                lines[token.start[0] - 1 + offset] += f" {line}"
    return "\n".join(lines)


RULES = (
    long_files,
    long_functions,
    full_folders,
    vague_names,
    repeated_names,
    undocumented,
    global_statements,
    idioms,
)
