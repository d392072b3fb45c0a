"""Every path that a document names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_CODE = re.compile(
    r"`([\w./-]+)`|\]\(([\w./-]+)\)"  # code and links
    r"|(?:python|deepspeed|torchrun)[^`\n]*?\b((?:launch|tools|benchmarks)/[\w/]+\.py)"  # commands
)
_WRITTEN_BY_COMMANDS = {"benchmarks/results/gpu-check.json"}
_FOLDERS = ("stagdist", "launch", "tools", "benchmarks", "tests", "configs", "docs")


def named_paths(text: str) -> set[str]:
    """Paths of Python files and Markdown links of a document, and of files below the repository's folders."""
    found = {part for groups in _CODE.findall(text) for part in groups if part}
    return {
        path.rstrip("/")
        for path in found - _WRITTEN_BY_COMMANDS
        if path.endswith((".py", ".md")) or (path.split("/")[0] in _FOLDERS and "/" in path)
    }


def missing(document: Path, root: Path) -> list[str]:
    """Named paths that exist neither in the repository, nor in the package, nor beside the document."""
    every = [path.relative_to(root).as_posix() for folder in _FOLDERS for path in (root / folder).rglob("*.py")]
    return sorted(
        path
        for path in named_paths(document.read_text())
        if not any((base / path).exists() for base in (root, root / "stagdist", document.parent))
        and not any(f"/{each}".endswith(f"/{path}") for each in every)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_a_document_exists(document: Path) -> None:
    assert missing(document, ROOT) == []


def test_a_path_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    (tmp_path / "stagdist" / "data").mkdir(parents=True)
    (tmp_path / "stagdist" / "data" / "loader.py").touch()
    page = tmp_path / "page.md"
    page.write_text("`data/loader.py`, `loader.py`, `data/gone.py`, [x](absent.md), `python launch/serve.py --x`")
    assert missing(page, tmp_path) == ["absent.md", "data/gone.py", "launch/serve.py"]
