"""A rank that freezes or dies takes the others down with one clear line, never into an endless wait."""

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.runs import Run, launch, pretrain, tiny_config

pytestmark = pytest.mark.ranks

TIMEOUT_S = 6
ENDLESS = 100_000
"""More steps than any of these runs gets to do."""


@contextlib.contextmanager
def endless_run(start: Callable[..., Run], corpus: Path, folder: Path) -> Iterator[tuple[Run, list[psutil.Process]]]:
    """A run of two stages that is under way, and its ranks; nothing of it outlives the test."""
    config = tiny_config(
        corpus,
        "run",
        parallel={"timeout_s": TIMEOUT_S},
        training={"steps": ENDLESS},
        data={"num_samples": 8 * ENDLESS},
        checkpoint={"interval_steps": 0},
    )
    run = start(folder, config)
    run.wait_for_step(folder / "runs/run/metrics.jsonl", 6)
    ranks = run.ranks()
    assert len(ranks) == 2
    try:
        yield run, ranks
    finally:
        for rank in ranks:  # also those that the launcher no longer has among its children
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


def names_stage_and_step(line: str) -> bool:
    """Whether the line says where and when it happened."""
    return all(re.search(rf"\b{word} \d+", line) for word in ("stage", "step"))


def test_a_frozen_rank_is_noticed_and_the_error_names_stage_and_step(corpus: Path, tmp_path: Path) -> None:
    with endless_run(pretrain, corpus, tmp_path) as (run, (first, second)):
        second.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        ended, _ = psutil.wait_procs([first], timeout=TIMEOUT_S + 12)
        waited_s = time.monotonic() - frozen_at
        assert ended, f"rank 0 still waits after {waited_s:.1f} s\n{run.text()}"
        assert waited_s > TIMEOUT_S / 2, f"rank 0 gave up after {waited_s:.1f} s, the limit is {TIMEOUT_S} s"
        reported = run.errors()
        assert len(reported) == 1 and names_stage_and_step(reported[0]), run.text()
        second.kill()
        assert run.wait() != 0
        assert len(run.errors()) == 1 and "Traceback" not in run.text(), run.text()


def test_a_killed_rank_ends_the_other_with_stage_and_step(corpus: Path, tmp_path: Path) -> None:
    with endless_run(pretrain, corpus, tmp_path) as (run, (first, second)):
        second.kill()
        ended, _ = psutil.wait_procs([first], timeout=TIMEOUT_S)
        assert ended, f"rank 0 still waits for rank 1, which is gone\n{run.text()}"
        assert run.wait() != 0
        assert len(run.errors()) == 1 and names_stage_and_step(run.errors()[0]), run.text()
        assert "Traceback" not in run.text(), run.text()


@pytest.mark.slow  # the test above checks what the rank says, and its end
def test_a_launcher_ends_the_other_ranks_of_one_that_is_killed(corpus: Path, tmp_path: Path) -> None:
    with endless_run(launch, corpus, tmp_path) as (run, (first, second)):
        second.kill()
        assert run.wait() != 0
        assert not first.is_running()
        reported = run.errors()  # rank 0 may be ended before it reports
        assert len(reported) <= 1 and all(map(names_stage_and_step, reported)), run.text()
        assert "Traceback" not in run.text(), run.text()
