"""The hosts of the lab tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import Lab
from tests.lab.wiring import obstacle, sweep


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts; `lab.add_host()` brings up more. Test folders are shared between them.

    Put the marker `lab` on every test that uses it, and `clean_lab` where it disturbs what others need.
    """
    if problem := obstacle():
        pytest.skip(problem)
    sweep()
    with Lab(2, shared=[tmp_path_factory.getbasetemp()]) as hosts:
        yield hosts


@pytest.fixture
def clean_lab(lab: Lab) -> Iterator[Lab]:
    """The lab, put right again after the test."""
    yield lab
    lab.reset()


@pytest.fixture(scope="session")
def whole_matrix() -> bool:
    """Whether LAB=all asks for every launcher on every grid."""
    return os.environ.get("LAB") == "all"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that all hosts see."""
    return tmp_path
