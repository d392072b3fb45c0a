"""A small real corpus for training runs, and the end of what tests have started."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from tests.launch.runs import UNDER_WAY


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte corpus made from files of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    prefix = tmp_path_factory.mktemp("corpus") / "stdlib"
    files = [str(path) for path in sorted(library.glob("*.py"))[:40]]
    prepare(files, str(prefix), byte_tokenizer())
    return prefix


@pytest.fixture(autouse=True)
def nothing_outlives_its_test() -> Iterator[None]:
    """End what a test has left running."""
    yield
    while UNDER_WAY:
        process, end = UNDER_WAY.pop()
        if process.poll() is None:
            end()
            process.wait()
