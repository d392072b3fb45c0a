"""Logging: rank 0 writes short lines to the console, every rank writes to its own file, frameworks are quiet.

Nothing of level WARNING or above is lost: on ranks other than 0 the console shows our own warnings and everybody's
errors, and the file of the rank holds the rest.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from stagdist.errors import ConfigError

PACKAGE = "stagdist"

CONSOLE_FORMAT = "%(asctime)s %(console_prefix)s%(message)s"
"""One line of the console; the prefix is the rank from 1 on and the level from WARNING on."""

HARMLESS_WARNINGS = ("Transformer Engine and Apex are not installed", "Warning: tp_group is None")
"""Beginnings of warnings about packages that stagdist does not use."""

FILE_FORMAT = "%(asctime)s %(levelname)s [rank %(rank)d] %(name)s: %(message)s"
"""One line of `logs/rank_00000.log`."""


def setup_logging(rank: int, folder: str | Path | None, *, stream: TextIO | None = None) -> logging.Logger:
    """Route all logging of this process; may be called again, for example once the frameworks are imported.

    Frameworks that keep their log away from the root logger (DeepSpeed, torch) are caught if they are imported by
    now: their own console output is raised to WARNING, and their lines go to the file as well.

    Args:
        rank: global rank of this process.
        folder: run folder; lines are appended to `folder/logs/rank_00000.log`. None: console only.
        stream: console, standard error unless given.

    Returns:
        The logger of the package.

    Raises:
        ConfigError: the log file cannot be written.
    """
    for logger in _known_loggers():
        for handler in list(logger.handlers):
            if isinstance(handler, _ConsoleHandler | _RankFileHandler):
                logger.removeHandler(handler)
                handler.close()
    files = [] if folder is None else [_RankFileHandler(Path(folder), rank)]
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in (_ConsoleHandler(rank, stream), *files):
        root.addHandler(handler)
    logging.captureWarnings(True)
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _quiet_isolated_loggers(rank, files)
    return logging.getLogger(PACKAGE)


def log_path(folder: str | Path, rank: int) -> Path:
    """File that holds the log of one rank."""
    return Path(folder) / "logs" / f"rank_{rank:05d}.log"


ONLY_IN_FILE = {"only_in_file": True}
"""Pass as `extra` for what the console need not show, for example the stack trace behind a plain error."""


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Short lines on the console that do not break an active progress bar.

    Rank 0 shows our lines and the warnings of others; other ranks show our warnings and the errors of others.
    """

    def __init__(self, rank: int, stream: TextIO | None) -> None:
        super().__init__(stream or sys.stderr)
        self.ours, self.others = (logging.INFO, logging.WARNING) if rank == 0 else (logging.WARNING, logging.ERROR)
        self.rank_prefix = f"[rank {rank}] " if rank else ""
        self.setFormatter(logging.Formatter(CONSOLE_FORMAT, datefmt="%H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "only_in_file", False):
            return False
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        record.console_prefix = self.rank_prefix + level
        ours = record.name == PACKAGE or record.name.startswith(PACKAGE + ".")
        return record.levelno >= (self.ours if ours else self.others)

    def emit(self, record: logging.LogRecord) -> None:
        # A bar on the same terminal must be cleared and drawn again around the line; only tqdm knows how.
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None or not getattr(tqdm, "_instances", None):
            super().emit(record)
            return
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:
            self.handleError(record)


class _RankFileHandler(logging.FileHandler):
    """Appends every line of INFO and above to the file of the rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = log_path(folder, rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(path, mode="a", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"cannot write the log file {path}: {reason}; choose a writable folder with runs_directory"
            ) from error
        self.setLevel(logging.INFO)
        self.setFormatter(logging.Formatter(FILE_FORMAT, defaults={"rank": rank}))


def _known_loggers() -> list[logging.Logger]:
    named = [entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger)]
    return [logging.getLogger(), *named]


def _quiet_isolated_loggers(rank: int, files: Sequence[logging.Handler]) -> None:
    """Loggers with `propagate` off that write to a console of their own: raise its level, add the file."""
    level = logging.WARNING if rank == 0 else logging.ERROR
    for logger in _known_loggers()[1:]:
        # Exactly StreamHandler: subclasses are files and torch's trace, which turns costly once it has a handler.
        consoles = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
        if logger.propagate or not consoles:
            continue
        for console in consoles:
            console.setLevel(max(console.level, level))
        for handler in files:
            logger.addHandler(handler)
