"""Where metrics go: always JSON lines; TensorBoard and wandb if they are enabled. Rank 0 only."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from stagdist.config.parts import WandbConfig
from stagdist.errors import ConfigError
from stagdist.files import writing
from stagdist.telemetry.wandb_run import WandbRun

METRICS_FILE = "metrics.jsonl"
RESERVED_KEYS = ("step", "time", "split")

LOG = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of one run folder.

    `metrics.jsonl` holds one object per line with `step`, `time` (Unix seconds) and `split` beside the values; a
    value that is not finite is null, because JSON has no NaN. The file holds one history: lines that an earlier attempt
    wrote after the step resumed from are dropped first.

    Args:
        folder: run folder.
        resumed_step: step of the checkpoint that the run resumes from; None for a new run.
        tensorboard: write events to `folder/tensorboard`.
        wandb: where to send metrics; None, or `enabled` false, sends nothing.
        name: name of the run in wandb; the folder's name unless given.
        config: resolved configuration, shown in wandb.
        clock: Unix seconds.

    Raises:
        ConfigError: the folder cannot be written, or an enabled package is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resumed_step: int | None = None,
        tensorboard: bool = False,
        wandb: WandbConfig | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = Path(folder)
        self._clock = clock
        self._tensorboard: Any = None
        self._wandb: WandbRun | None = None
        self._lines: TextIO = _open_lines(self._folder, resumed_step)
        if tensorboard:
            self._tensorboard = _open_tensorboard(self._folder, resumed_step)
        if wandb is not None and wandb.enabled:
            self._wandb = WandbRun(
                self._folder,
                wandb,
                name=name or self._folder.name,
                config=config or {},
                resumed=resumed_step is not None,
            )

    def write(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of one step: `split` is train, validation or test.

        Values are numbers, scalar tensors (fetched here), strings or None. The line is handed to the operating
        system before this returns, so that a killed process loses none.

        Raises:
            ValueError: a value uses a reserved name.
        """
        taken = [key for key in RESERVED_KEYS if key in values]
        if taken:
            raise ValueError(f"metrics named {taken} collide with the keys of every line; rename them")
        plain = {key: _plain(value) for key, value in values.items()}
        line = {"step": int(step), "time": round(self._clock(), 3), "split": split}
        line |= {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in plain.items()
        }
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        numbers = {f"{split}/{key}": value for key, value in plain.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": int(step)})

    def flush(self) -> None:
        """Make all lines durable, for example before a checkpoint is declared complete."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Close everything; may be called twice."""
        if self._lines.closed:
            return
        self.flush()
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def keep_history(path: Path, resumed_step: int | None) -> int:
    """Drop the lines of an earlier attempt after `resumed_step` (None: all of them).

    A line that a kill cut off is dropped too.

    Returns:
        Lines dropped.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            step = _line_step(line)
            if resumed_step is not None and step is not None and step <= resumed_step:
                kept.append(line)
            else:
                dropped += 1
    if dropped:
        with writing(path, sync=True) as file:
            file.writelines(kept)
    return dropped


def last_values(folder: str | Path, split: str) -> dict[str, Any]:
    """The newest line of a split in `folder/metrics.jsonl`; empty when there is none."""
    path = Path(folder) / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[str, Any] = next(
        (values for values in map(json.loads, reversed(lines)) if values["split"] == split), {}
    )
    return found


def _line_step(line: str) -> int | None:
    """Step of a complete line, None for one that is cut off."""
    if not line.endswith("\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _open_lines(folder: Path, resumed_step: int | None) -> TextIO:
    path = folder / METRICS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        dropped = keep_history(path, resumed_step)
        if dropped:
            since = "from the start" if resumed_step is None else f"from step {resumed_step}"
            LOG.info("%s: dropped %d lines of an earlier attempt; the run continues %s", path, dropped, since)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; choose a writable folder with runs_directory"
        ) from error


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


def _plain(value: Any) -> int | float | str | None:
    """A number from a Python, numpy or torch scalar; strings and None stay."""
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, int) else float(value)
