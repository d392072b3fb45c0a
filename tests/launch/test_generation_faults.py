"""While text is generated a rank dies, freezes or is asked to stop: the others end in time, with one line about it."""

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.launch.generating import GENERATE, command, start_command, start_ranks, write_model
from tests.launch.runs import POLL_S, ROOT, Launch, Run, is_alive
from tests.ranks import GUARD_S

pytestmark = pytest.mark.ranks

TIMEOUT_S = 4
ENDLESS = 60_000
"""More tokens than any of these runs gets to generate."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model directory with a long context."""
    return write_model(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=ENDLESS)


@contextlib.contextmanager
def endless(folder: Path, model: Path, launcher: str | None = None) -> Iterator[tuple[Run, list[psutil.Process]]]:
    """Two ranks that are generating, and nothing of them afterwards; forks unless there is a launcher."""
    arguments = ["--max-new-tokens", str(ENDLESS), "--ignore-eos", "--timeout", str(TIMEOUT_S)]
    if launcher is None:
        run: Run = start_ranks(folder, model, "--prompt", "abc", *arguments)
    else:
        run = started = start_command(folder, command(launcher, model, *arguments))
        started.give(b"abc\n")
    run.wait_for(100)
    ranks = run.ranks()
    assert len(ranks) == 2, ranks
    try:
        yield run, ranks
    finally:
        for rank in ranks:  # also those that the launcher no longer has among its children
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


def gone_after(ranks: list[psutil.Process], since_s: float, limit_s: float) -> float:
    """Seconds until all of these have ended; a busy parent may fetch them later."""
    while alive := list(filter(is_alive, ranks)):
        assert time.monotonic() - since_s < limit_s, f"still running after {limit_s} s: {alive}"
        time.sleep(POLL_S)
    return time.monotonic() - since_s


def only_error(run: Run) -> str:
    """The one line that says what went wrong."""
    errors = run.errors()
    assert len(errors) == 1 and "Traceback" not in run.text(), run.text()
    return errors[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_stage_and_step(model: Path, tmp_path: Path, victim: int) -> None:
    with endless(tmp_path, model) as (run, ranks):
        ranks[victim].kill()
        gone_after([ranks[1 - victim]], time.monotonic(), TIMEOUT_S)
        assert run.wait() != 0
        other = 1 - victim
        assert re.search(rf"stage {other} \(rank {other}\) lost .* in step \d+ while", only_error(run)), run.text()
        assert run.out.read_bytes().startswith(b"abc")  # what was generated until then stays


def test_a_frozen_rank_ends_the_other_after_the_timeout(model: Path, tmp_path: Path) -> None:
    with endless(tmp_path, model) as first, endless(tmp_path, model) as second:
        runs = list(enumerate((first, second)))
        for victim, (_, ranks) in runs:
            ranks[victim].send_signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        with ThreadPoolExecutor() as pool:
            others = [[ranks[1 - victim]] for victim, (_, ranks) in runs]
            waits_s = list(pool.map(lambda other: gone_after(other, frozen_s, TIMEOUT_S + 4), others))
        assert min(waits_s) > TIMEOUT_S - 1, f"gave up after {waits_s} s"
        for victim, (run, ranks) in runs:
            other = 1 - victim
            assert re.search(rf"stage {other} \(rank {other}\) lost .* in step \d+ while", only_error(run)), run.text()
            ranks[victim].kill()
            assert run.wait() != 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_rank_0_shuts_all_down_cleanly(model: Path, tmp_path: Path, number: int, code: int) -> None:
    with endless(tmp_path, model) as (run, ranks):
        ranks[0].send_signal(number)
        gone_after(ranks, time.monotonic(), TIMEOUT_S)
        assert run.wait() == code
        assert run.errors() == [] and "interrupted; 1 prompt" in run.text()
        assert "decoding" in run.text()  # the summary of what there was
        assert run.out.read_bytes().startswith(b"abc")


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("deepspeed", signal.SIGINT),
        # The test above sends SIGTERM to a rank.
        pytest.param("deepspeed", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("torchrun", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_command_leaves_no_rank_behind(model: Path, tmp_path: Path, launcher: str, number: int) -> None:
    with endless(tmp_path, model, launcher) as (run, ranks):
        assert isinstance(run, Launch)
        family = run.family()
        assert set(ranks) <= set(family)
        if number == signal.SIGINT:  # a terminal sends it to all
            for process in family:
                process.send_signal(number)
        run.process.send_signal(number)  # DeepSpeed's command does not pass it on
        gone_after(ranks, time.monotonic(), TIMEOUT_S + 4)
        gone_after(family, time.monotonic(), GUARD_S)  # the launcher, which takes seconds on a busy machine
        assert run.wait() != 0
        assert run.errors() == [] and "interrupted; 1 prompt" in run.text()


def test_a_second_interrupt_ends_a_rank_at_once_that_waits_for_a_frozen_one(model: Path, tmp_path: Path) -> None:
    with endless(tmp_path, model) as (run, ranks):
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        ranks[0].send_signal(signal.SIGINT)
        time.sleep(1)
        assert ranks[0].is_running() and ranks[0].status() != psutil.STATUS_ZOMBIE
        ranks[0].send_signal(signal.SIGINT)
        assert gone_after(ranks[:1], time.monotonic(), 2) < 2
        assert run.errors() == []


def test_a_supervisor_names_a_rank_that_is_frozen_while_text_is_generated(model: Path, tmp_path: Path) -> None:
    supervised = [sys.executable, str(ROOT / "launch" / "run.py"), "--folder", str(tmp_path / "run")]
    supervised += ["--max-restarts", "0", "--hang-timeout-s", "3", "--", str(GENERATE), "--model", str(model)]
    words = [*supervised, "--device", "cpu", "--prompt", "abc", "--max-new-tokens", str(ENDLESS), "--ignore-eos"]
    run = start_command(tmp_path, words)
    log = tmp_path / "run" / "logs" / "attempt_001"
    run.wait_until(lambda: any(path.stat().st_size for path in log.glob("rank_00000.*.log")), "text of rank 0")
    family = run.family()
    run.ranks()[1].send_signal(signal.SIGSTOP)
    assert run.wait() == 1
    last = run.text().splitlines()[-1]
    assert re.match(r"error: first error: rank 1 on \S+ is stuck in phase \w+ \(stopped, silent for \d s\)", last)
    assert gone_after(family, time.monotonic(), 5) < 5
