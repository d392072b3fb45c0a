"""Progress of a training run: a bar on a terminal, otherwise a line at intervals."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from stagdist.telemetry.hardware import MemoryReading
from stagdist.telemetry.meters import Throughput

PLAIN_INTERVAL_S = 10.0
"""Seconds between plain lines where the output is not a terminal."""


@dataclass(frozen=True)
class StepReport:
    """What one step has to tell."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None = None
    throughput: Throughput | None = None
    memory: MemoryReading | None = None


class Progress:
    """Shows the reports of rank 0. Other ranks pass `enabled=False`, and nothing is shown.

    Args:
        total_steps: last step of the run.
        first_step: steps already done (resumed runs).
        enabled: False shows nothing.
        plain_interval_s: seconds between lines off a terminal; the first and the last report are always shown.
        stream: standard error unless given.
        clock: seconds from any origin, never going back.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        enabled: bool = True,
        plain_interval_s: float = PLAIN_INTERVAL_S,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._enabled = enabled
        self._plain_interval_s = plain_interval_s
        self._stream = stream or sys.stderr
        self._clock = clock
        self._shown_s: float | None = None
        self._latest: str | None = None
        self._bar: Any = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar:20}| {postfix}",
            )

    def show(self, report: StepReport) -> None:
        """Show one report, at once on a terminal, otherwise when the last line is old enough."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(report_parts(report)), refresh=False)
            self._bar.update(report.step - self._bar.n)
            return
        line = f"step {report.step}/{self._total_steps}  " + "  ".join(report_parts(report))
        now = self._clock()
        due = self._shown_s is None or now - self._shown_s >= self._plain_interval_s
        if due or report.step >= self._total_steps:
            self._shown_s, self._latest = now, None
            self._print(line)
        else:
            self._latest = line

    def close(self) -> None:
        """End the display; the last report is shown if it was held back."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self._latest is not None:
            self._print(self._latest)
            self._latest = None

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def report_parts(report: StepReport) -> list[str]:
    """The pieces of a progress line; what is not known is left out."""
    parts = [f"loss {report.loss:.4f}", f"lr {report.learning_rate:.2e}"]
    if report.grad_norm is not None:
        parts.append(f"grad {report.grad_norm:.3g}")
    speed = report.throughput
    if speed is not None:
        parts.append(f"{with_unit(speed.tokens_per_s)}tok/s")
        parts.append(f"{speed.model_tflops_per_s:.3g} TFLOP/s")
        if speed.mfu is not None:
            parts.append(f"MFU {speed.mfu:.1%}")
    if report.memory is not None:
        parts.append(f"mem {report.memory.bytes / 2**30:.2f} GiB")
    if speed is not None:
        parts.append(f"left {duration(speed.time_left_s)}")
    return parts


def with_unit(number: float) -> str:
    """A number with three digits and a decimal prefix: 12345 -> `12.3 k`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "


def duration(seconds: float) -> str:
    """Seconds as `1:02:03`, with days in front where there are any."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
