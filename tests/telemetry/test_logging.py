"""Log lines reach the right place: console of rank 0, file of every rank, and no warning is lost."""

import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagdist.errors import ConfigError
from stagdist.telemetry.logging import log_path, setup_logging


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def _speak() -> None:
    for name in ("stagdist.training", "megatron.core"):
        logger = logging.getLogger(name)
        logger.info("%s info", name)
        logger.warning("%s warning", name)
        logger.error("%s error", name)


def test_rank_0_shows_our_lines_and_the_warnings_of_others(tmp_path: Path) -> None:
    console = io.StringIO()
    setup_logging(0, tmp_path, stream=console)
    _speak()
    shown = [line.split(" ", 1)[1] for line in console.getvalue().splitlines()]
    assert shown == [
        "stagdist.training info",
        "WARNING stagdist.training warning",
        "ERROR stagdist.training error",
        "WARNING megatron.core warning",
        "ERROR megatron.core error",
    ]


def test_other_ranks_show_only_our_warnings_and_errors_with_their_rank(tmp_path: Path) -> None:
    console = io.StringIO()
    setup_logging(3, tmp_path, stream=console)
    _speak()
    shown = [line.split(" ", 1)[1] for line in console.getvalue().splitlines()]
    assert shown == [
        "[rank 3] WARNING stagdist.training warning",
        "[rank 3] ERROR stagdist.training error",
        "[rank 3] ERROR megatron.core error",
    ]


def test_every_rank_keeps_everything_in_its_own_file(tmp_path: Path) -> None:
    setup_logging(3, tmp_path, stream=io.StringIO())
    _speak()
    lines = (tmp_path / "logs" / "rank_00003.log").read_text().splitlines()
    assert len(lines) == 6
    assert lines[3].endswith("INFO [rank 3] megatron.core: megatron.core info")


def test_calling_again_neither_doubles_lines_nor_loses_earlier_ones(tmp_path: Path) -> None:
    console = io.StringIO()
    logger = setup_logging(0, tmp_path, stream=console)
    logger.info("before")
    logger = setup_logging(0, tmp_path, stream=console)
    logger.info("after")
    assert [line.split()[-1] for line in console.getvalue().splitlines()] == ["before", "after"]
    assert [line.split()[-1] for line in log_path(tmp_path, 0).read_text().splitlines()] == ["before", "after"]


def test_python_warnings_become_log_lines(tmp_path: Path) -> None:
    console = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setup_logging(0, tmp_path, stream=console)
        warnings.warn("old interface", FutureWarning)
        logging.captureWarnings(False)
    assert "FutureWarning: old interface" in console.getvalue()
    assert "FutureWarning: old interface" in log_path(tmp_path, 0).read_text()


def test_isolated_framework_loggers_are_quiet_on_the_console_and_kept_in_the_file(tmp_path: Path) -> None:
    own_console = io.StringIO()
    isolated = logging.getLogger("IsolatedFramework")
    isolated.propagate = False
    isolated.setLevel(logging.INFO)
    handler = logging.StreamHandler(own_console)
    isolated.addHandler(handler)
    try:
        setup_logging(0, tmp_path, stream=io.StringIO())
        isolated.info("chatter")
        isolated.warning("trouble")
        setup_logging(1, None, stream=io.StringIO())
        isolated.warning("trouble on rank 1")
        isolated.error("failure on rank 1")
    finally:
        isolated.removeHandler(handler)
        isolated.propagate = True
    assert own_console.getvalue().splitlines() == ["trouble", "failure on rank 1"]
    kept = log_path(tmp_path, 0).read_text()
    assert "IsolatedFramework: chatter" in kept and "IsolatedFramework: trouble" in kept


def test_deepspeeds_own_logger_is_caught(tmp_path: Path) -> None:
    script = f"""
import logging
from deepspeed.utils import logger
from stagdist.telemetry.logging import setup_logging
logger.setLevel(logging.INFO)
logger.handlers[0].setLevel(logging.INFO)
setup_logging(0, {str(tmp_path)!r})
logger.info("deepspeed chatter")
logger.warning("deepspeed warning")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    shown = result.stdout + result.stderr
    assert shown.count("deepspeed warning") == 1
    assert "deepspeed chatter" not in shown
    kept = log_path(tmp_path, 0).read_text()
    assert "DeepSpeed: deepspeed chatter" in kept and "DeepSpeed: deepspeed warning" in kept


def test_a_line_does_not_tear_an_active_bar() -> None:
    from tqdm import tqdm

    console = io.StringIO()
    logger = setup_logging(0, None, stream=console)
    with tqdm(total=2, file=console, mininterval=0) as bar:
        bar.update(1)
        logger.info("in between")
        bar.update(1)
    line = next(line for line in console.getvalue().splitlines() if "in between" in line)
    assert line.split()[1:] == ["in", "between"]


def test_an_unwritable_folder_is_refused_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the way")
    with pytest.raises(ConfigError, match="rank_00000.log.*runs_directory"):
        setup_logging(0, tmp_path)
