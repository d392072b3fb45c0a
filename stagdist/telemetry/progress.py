"""Progress of a training run: a bar on a terminal, otherwise a line at intervals."""

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TextIO

PLAIN_INTERVAL_S = 10.0
"""Seconds between plain lines where the output is not a terminal."""


class Progress:
    """Shows the metrics of each step on rank 0. Other ranks pass `enabled=False`.

    Args:
        first_step: steps already done (resumed runs).
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

    def show(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show the metrics of one step, at once on a terminal, otherwise when the last line is old enough."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(progress_parts(values)), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        line = f"step {step}/{self._total_steps}  " + "  ".join(progress_parts(values))
        now = self._clock()
        due = self._shown_s is None or now - self._shown_s >= self._plain_interval_s
        if due or step >= self._total_steps:
            self._shown_s, self._latest = now, None
            print(line, file=self._stream, flush=True)
        else:
            self._latest = line

    def close(self) -> None:
        """End the display; the last report is shown if it was held back."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self._latest is not None:
            print(self._latest, file=self._stream, flush=True)
            self._latest = None


_PARTS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "learning_rate": "lr {:.2e}".format,
    "grad_norm": "grad {:.3g}".format,
    "tokens_per_s": lambda speed: f"{with_unit(speed)}tok/s",
    "model_tflops_per_s": "{:.3g} TFLOP/s".format,
    "mfu": "MFU {:.1%}".format,
    "memory": lambda size: f"mem {size / 2**30:.2f} GiB",
    "time_left_s": lambda left_s: f"left {timedelta(seconds=round(left_s))}",
}
"""What a progress line shows, by the name of the metric; `memory` is any measure of it."""


def progress_parts(values: Mapping[str, float | None]) -> list[str]:
    """The pieces of a progress line; values that are not known are left out."""
    named = {"memory" if name.startswith("memory_") else name: value for name, value in values.items()}
    known = {name: value for name, value in named.items() if value is not None}
    return [part(known[name]) for name, part in _PARTS.items() if name in known]


def with_unit(number: float) -> str:
    """A number with three digits and a decimal prefix: 12345 -> `12.3 k`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
