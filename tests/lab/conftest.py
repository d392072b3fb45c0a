"""The hosts of the lab tests, and what local runs compute, which launches over hosts must equal."""

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from tests.lab.drill import supervised_config
from tests.lab.hosts import Lab
from tests.lab.launching import GRIDS, run_config
from tests.lab.wiring import obstacle, sweep
from tests.launch.runs import losses, pretrain

Losses = Callable[[str], dict[int, float]]
"""Losses by step of the run on a grid, by its name."""


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts; `lab.add_host()` brings up more. Test folders are shared between them.

    Put the marker `lab` on every test that uses it; take `clean_lab` where a test disturbs what others need.
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that all hosts see, for the test alone."""
    return tmp_path


@pytest.fixture(scope="session")
def lab_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte corpus made from files of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    prefix = tmp_path_factory.mktemp("corpus") / "stdlib"
    prepare([str(path) for path in sorted(library.glob("*.py"))[:40]], str(prefix), byte_tokenizer())
    return prefix


@pytest.fixture(scope="session")
def local_losses(tmp_path_factory: pytest.TempPathFactory, lab_corpus: Path) -> Losses:
    """Losses by step of a grid, run once on forked ranks of this machine."""
    return _run_once(tmp_path_factory, lambda grid: run_config(lab_corpus, grid))


@pytest.fixture(scope="session")
def supervised_losses(tmp_path_factory: pytest.TempPathFactory, lab_corpus: Path) -> Losses:
    """The same of the longer runs that are disturbed."""
    return _run_once(tmp_path_factory, lambda grid: supervised_config(lab_corpus, grid))


def _run_once(folders: pytest.TempPathFactory, config_of: Callable[[str], dict[str, Any]]) -> Losses:
    known: dict[str, dict[int, float]] = {}

    def of(grid: str) -> dict[int, float]:
        if grid not in known:
            folder = folders.mktemp(f"local-{grid}")
            run = pretrain(folder, config_of(grid), ranks=2 * GRIDS[grid].slots)
            assert run.wait() == 0, run.text()
            known[grid] = losses(folder, "run")
        return known[grid]

    return of
