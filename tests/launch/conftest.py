"""A small real corpus for runs through the launcher."""

import sysconfig
from pathlib import Path

import pytest

from stagdist.data.prepare import prepare
from stagdist.data.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte corpus made from files of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    prefix = tmp_path_factory.mktemp("corpus") / "stdlib"
    files = [str(path) for path in sorted(library.glob("*.py"))[:40]]
    prepare(files, str(prefix), byte_tokenizer())
    return prefix
