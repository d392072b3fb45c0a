"""How fast training goes: tokens and model FLOP per second, use of the device, time left."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ThroughputMeter:
    """Speeds from step numbers and a clock. Call `start` once, `record` after every step.

    Args:
        flops_per_token: model FLOP of forward and backward pass per token of the model (no recomputation).
        tokens_per_step: tokens of one optimizer step over all replicas.
        num_devices: devices (or processes on CPUs) that share the work.
        peak_flops: peak FLOP/s of one device, None where it is not known.
        total_steps: last step of the run, for the time left.
        window_steps: steps over which speeds are taken.
        clock: seconds from any origin, never going back.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        tokens_per_step: int,
        num_devices: int,
        peak_flops: float | None,
        total_steps: int,
        window_steps: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if min(num_devices, window_steps, tokens_per_step) < 1:
            raise ValueError(
                f"num_devices {num_devices}, window_steps {window_steps} and tokens_per_step {tokens_per_step} "
                "must be at least 1"
            )
        self._flops_per_token = flops_per_token
        self._tokens_per_step = tokens_per_step
        self._num_devices = num_devices
        self._peak_flops = peak_flops
        self._total_steps = total_steps
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque(maxlen=window_steps + 1)
        self._first: tuple[int, float] | None = None
        self._paused_s = 0.0

    def start(self, step: int) -> None:
        """Start the clock; `step` steps are already done (0, or the step resumed from)."""
        self._paused_s = 0.0
        self._first = (step, self._clock())
        self._marks.clear()
        self._marks.append(self._first)

    def record(self, step: int) -> None:
        """Step number `step` has just ended."""
        if not self._marks:
            raise ValueError("ThroughputMeter.record before ThroughputMeter.start")
        if step <= self._marks[-1][0]:
            raise ValueError(f"step {step} recorded after step {self._marks[-1][0]}")
        self._marks.append((step, self._clock() - self._paused_s))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - begin

    def reading(self) -> dict[str, float]:
        """Speeds over the last steps and the time left, under their names in `metrics.jsonl`.

        Pauses count only in the time left. `mfu` is there only where the peak is known.

        Raises:
            ValueError: no step was recorded yet.
        """
        step_s = self._seconds_per_step(self._marks[0] if self._marks else None)
        tokens_per_s = self._tokens_per_step / step_s
        flops_per_s = tokens_per_s * self._flops_per_token
        per_device = flops_per_s / self._num_devices
        values = {
            "tokens_per_s": tokens_per_s,
            "step_s": step_s,
            "model_tflops_per_s": flops_per_s / 1e12,
            "model_tflops_per_s_per_device": per_device / 1e12,
        }
        if self._peak_flops is not None:
            values["mfu"] = per_device / self._peak_flops
        return values | {"time_left_s": self._time_left_s(step_s)}

    def average_tokens_per_s(self) -> float:
        """Tokens per second since `start`, pauses left out.

        Raises:
            ValueError: no step was recorded yet.
        """
        return self._tokens_per_step / self._seconds_per_step(self._first)

    def _seconds_per_step(self, since: tuple[int, float] | None) -> float:
        if since is None or self._marks[-1][0] <= since[0]:
            raise ValueError("no step was recorded yet")
        last_step, last_s = self._marks[-1]
        # A clock too coarse for the steps must not divide by zero.
        return max(last_s - since[1], 1e-9) / (last_step - since[0])

    def _time_left_s(self, step_s: float) -> float:
        """Remaining steps at the present speed, stretched by the share that pauses took so far."""
        assert self._first is not None
        last_step, last_s = self._marks[-1]
        trained_s = max(last_s - self._first[1], 1e-9)
        return max(0, self._total_steps - last_step) * step_s * (1 + self._paused_s / trained_s)
