"""What `make test` runs, and how it ends."""

import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.suite import WAITING, Job, jobs, run


def test_every_folder_of_tests_is_in_exactly_one_process(tmp_path: Path) -> None:
    assert all((ROOT / name).is_dir() for name in WAITING)
    first, second = (job.command for job in jobs(tmp_path, ["-m", "not slow"])[1:])
    assert [word for word in first if word.startswith("tests")] == list(WAITING)
    assert "tests" in second and {f"--ignore={name}" for name in WAITING} <= set(second)
    assert all(command[3:5] == ["-m", "not slow"] for command in (first, second))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0, 0), 0), ((1, 0, 0), 1), ((0, 1, 0), 1), ((0, 0, 2), 1), ((0, 5, 0), 0), ((0, 5, 5), 1), ((0, -9, 0), 1)],
)
def test_one_failure_fails_the_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: tuple[int, ...], expected: int
) -> None:
    started = []
    for name, code in zip(("mypy", "first", "second"), codes, strict=True):
        end = f"sys.exit({code})" if code >= 0 else "os.kill(os.getpid(), 9)"
        log = None if name == "second" else tmp_path / name
        started.append(Job(name, [sys.executable, "-c", f"import os, sys; print('ran', flush=True); {end}"], log))
        started[-1].start()
    assert run(started) == expected
    printed = capsys.readouterr().out
    assert printed.count("ran") == 2 and f"exit code {codes[1]}  first" in printed
