"""How fast training goes: tokens and model FLOP per second, use of the device, time left."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class ThroughputMeter:
    """Speeds from step numbers and a clock. Call `start` once, `record` after every step, then read.

    Attributes:
        flops_per_token: model FLOP of forward and backward pass per token of the model (no recomputation).
        tokens_per_step: tokens of one optimizer step over all replicas.
        num_devices: devices (or processes on CPUs) that share the work.
        peak_flops: peak FLOP/s of one device, None where it is not known.
        total_steps: last step of the run, for the time left.
        window_steps: steps over which speeds are taken.
        clock: seconds from any origin, never going back.
    """

    flops_per_token: float
    tokens_per_step: int
    num_devices: int
    peak_flops: float | None
    total_steps: int
    window_steps: int = 20
    clock: Callable[[], float] = time.perf_counter
    _marks: deque[tuple[int, float]] = field(default_factory=deque, init=False)
    _first: tuple[int, float] = field(default=(0, 0.0), init=False)
    _paused_s: float = field(default=0.0, init=False)

    def start(self, step: int) -> None:
        """Start the clock; `step` steps are already done (0, or the step resumed from)."""
        self._paused_s = 0.0
        self._first = (step, self.clock())
        self._marks = deque([self._first], maxlen=self.window_steps + 1)

    def record(self, step: int) -> None:
        """Step number `step` has just ended."""
        self._marks.append((step, self.clock() - self._paused_s))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        begin = self.clock()
        try:
            yield
        finally:
            self._paused_s += self.clock() - begin

    def reading(self) -> dict[str, float]:
        """Speeds over the last steps and the time left, under their names in `metrics.jsonl`.

        Pauses count only in the time left. `mfu` is there only where the peak is known.
        """
        step_s = self._seconds_per_step(self._marks[0])
        tokens_per_s = self.tokens_per_step / step_s
        flops_per_s = tokens_per_s * self.flops_per_token
        per_device = flops_per_s / self.num_devices
        last_step, last_s = self._marks[-1]
        pauses = self._paused_s / max(last_s - self._first[1], 1e-9)
        return {
            "tokens_per_s": tokens_per_s,
            "step_s": step_s,
            "model_tflops_per_s": flops_per_s / 1e12,
            "model_tflops_per_s_per_device": per_device / 1e12,
            **({} if self.peak_flops is None else {"mfu": per_device / self.peak_flops}),
            "time_left_s": max(0, self.total_steps - last_step) * step_s * (1 + pauses),
        }

    def average_tokens_per_s(self) -> float:
        """Tokens per second since `start`, pauses left out."""
        return self.tokens_per_step / self._seconds_per_step(self._first)

    def _seconds_per_step(self, since: tuple[int, float]) -> float:
        last_step, last_s = self._marks[-1]
        # A clock too coarse for the steps must not divide by zero.
        return max(last_s - since[1], 1e-9) / (last_step - since[0])
