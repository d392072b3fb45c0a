"""Where metrics go: always JSON lines; TensorBoard and wandb if they are enabled. Rank 0 only."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from stagdist.config.parts import LoggingConfig
from stagdist.errors import ConfigError
from stagdist.files import writing
from stagdist.telemetry.wandb_run import start_wandb

METRICS_FILE = "metrics.jsonl"

LOG = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of one run folder.

    `metrics.jsonl` holds one object per line with `step`, `time` (Unix seconds) and `split` beside the values; a
    value that is not finite is null, because JSON has no NaN. The file holds one history: lines that an earlier attempt
    wrote after the step resumed from are dropped first.

    Args:
        folder: run folder.
        resumed_step: step of the checkpoint that the run resumes from; None for a new run.
        logging: whether metrics also go to TensorBoard (events in `folder/tensorboard`) and wandb.
        name: name of the run in wandb; the folder's name unless given.
        config: resolved configuration, shown in wandb.

    Raises:
        ConfigError: the folder cannot be written, or an enabled package is missing.
    """

    def __init__(
        self,
        folder: Path,
        logging: LoggingConfig | None = None,
        *,
        resumed_step: int | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        logging = logging or LoggingConfig()
        self._lines = _open_lines(folder, resumed_step)
        self._tensorboard = _open_tensorboard(folder, resumed_step) if logging.tensorboard else None
        self._wandb: Any = None
        if logging.wandb.enabled:
            resumed = resumed_step is not None
            name = name or folder.name
            self._wandb = start_wandb(folder, logging.wandb, name=name, config=config or {}, resumed=resumed)

    def write(self, split: str, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values of one step: `split` is train, validation or test.

        The line is handed to the operating system before this returns, so that a killed process loses none.
        """
        finite = {key: None if value is None or not math.isfinite(value) else value for key, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), "split": split, **finite}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        numbers = {f"{split}/{key}": value for key, value in values.items() if value is not None}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def flush(self) -> None:
        """Make all lines durable, for example before a checkpoint is declared complete."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Write everything to the disk and close it."""
        self.flush()
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: str | Path, split: str) -> list[dict[str, Any]]:
    """The lines of one split in a `metrics.jsonl`."""
    with open(path, encoding="utf-8") as lines:
        return [values for values in map(json.loads, lines) if values["split"] == split]


def last_values(folder: Path, split: str) -> dict[str, Any]:
    """The newest line of a split in `folder/metrics.jsonl`; empty when there is none."""
    path = folder / METRICS_FILE
    return (read_metrics(path, split) or [{}])[-1] if path.exists() else {}


def _open_lines(folder: Path, resumed_step: int | None) -> TextIO:
    """Open `metrics.jsonl` after dropping what an earlier attempt wrote after `resumed_step` (None: all of it)."""
    path = folder / METRICS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if resumed_step is not None and _line_step(line) <= resumed_step]
        if len(kept) < len(lines):
            with writing(path, sync=True) as file:
                file.writelines(kept)
            since = "from the start" if resumed_step is None else f"from step {resumed_step}"
            dropped = len(lines) - len(kept)
            LOG.info("%s: dropped %d lines of an earlier attempt; the run continues %s", path, dropped, since)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; choose a writable folder with runs_directory"
        ) from error


def _line_step(line: str) -> float:
    """Step of a line; infinite for one that a kill cut off."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _open_tensorboard(folder: Path, resumed_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "logging.tensorboard is true, but the package tensorboard is missing; pip install tensorboard"
        ) from error
    # Readers then hide what an earlier attempt wrote beyond this step.
    purge_step = 0 if resumed_step is None else resumed_step + 1
    return SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge_step)
