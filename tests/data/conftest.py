"""Real text for the data tests: the standard library's own source, and a tokenizer trained on it."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import Tokenizer, train_bpe
from tests.ranks import run_script

LIBRARY = Path(json.__file__).parent.parent
ROOT = Path(__file__).parents[2]

RunTool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def library_files() -> list[Path]:
    """Some sixty modules of the standard library, about 1 MB."""
    files = [path for folder in ("asyncio", "email", "json") for path in sorted((LIBRARY / folder).glob("*.py"))]
    assert len(files) > 50 and sum(path.stat().st_size for path in files) > 800_000
    return files


@pytest.fixture(scope="session")
def bpe(library_files: list[Path]) -> Tokenizer:
    """A byte-level BPE of 1000 tokens."""
    return train_bpe((path.read_text(encoding="utf-8") for path in library_files), 1000)


@pytest.fixture(scope="session")
def bpe_directory(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BPE tokenizer, saved."""
    directory = tmp_path_factory.mktemp("tokenizer") / "bpe"
    bpe.save(directory)
    return directory


@pytest.fixture(scope="session")
def corpus(bpe: Tokenizer, library_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The modules prepared with the BPE tokenizer; its prefix."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "library")
    prepare([str(path) for path in library_files], prefix, bpe)
    return prefix


@pytest.fixture
def run_tool(tmp_path: Path) -> RunTool:
    """Run a tool as a user does: in another working directory, in a process of its own.

    It is a fork that has imported `transformers`; with a launcher, which may be empty, it is a fresh process.
    """

    def run(
        name: str, *arguments: object, launcher: tuple[str, ...] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        tool, words = ROOT / "tools" / name, [str(each) for each in arguments]
        if launcher is None:
            with contextlib.chdir(tmp_path):
                return run_script(tool, *words)
        return subprocess.run(
            [*launcher, sys.executable, str(tool), *words], cwd=tmp_path, env=tool_environment(), capture_output=True,
            text=True, timeout=600,
        )  # fmt: skip

    return run


def tool_environment() -> dict[str, str]:
    """Environment in which the package is found and no network is tried."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
