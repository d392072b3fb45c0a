"""The sizes of chunks: of a prompt alone on several stages, and beside steps, where the time of operations decides."""

import time

from stagdist.decode.topology import Limits

SMALLEST_CHUNK = 16
"""Positions; chunks are multiples of it."""

_FIRST_PART = 96
_SHARE = 8
"""Size of a tapering chunk: `_FIRST_PART` positions plus 1 / `_SHARE` of the remaining ones."""
_SMALLEST_END = 32  # positions; fewer join the chunk before

_MARGIN = 0.9  # share of the target that is aimed at
_SMOOTHING = 0.1  # weight of the newest step in the mean


def tapering_chunk(remaining: int, most: int) -> int:
    """Positions of the next chunk of a prompt that has several stages to itself.

    Such a prompt takes as long as the first stage takes for all chunks and the later stages for the last one. A large
    chunk costs less per position, a small last one ends sooner. So chunks become smaller towards the end, slowly enough
    for a stage that is a little faster than the one before it to be ready when the next chunk arrives.

    Args:
        remaining: positions of the prompt that have not entered.
        most: positions of a chunk, at most.
    """
    size = (_FIRST_PART + remaining // _SHARE) // SMALLEST_CHUNK * SMALLEST_CHUNK
    return remaining if remaining <= most and remaining - size < _SMALLEST_END else min(most, size)


class ChunkSizer:
    """Measures operations on rank 0, and chooses the size of chunks beside steps.

    The time that a chunk adds to a step is neither constant nor proportional to its size, and grows with the context.
    So the size follows the measurements: half of the way (of the logarithms) after every operation. Before the first
    step without a chunk the complete time counts as the chunk's, which errs towards small chunks.

    Attributes:
        step_s: moving mean of steps without a chunk; 0 before the first one.
    """

    def __init__(self, limits: Limits):
        self.step_s = 0.0
        self._target_s, self._most = limits.inter_token_target_s, limits.chunk_size
        self._size = float(min(SMALLEST_CHUNK, self._most))
        self._last_s: float | None = None

    @property
    def chunk(self) -> int:
        """Positions of the next chunk that runs beside a step."""
        if self._target_s is None or self._most < SMALLEST_CHUNK:
            return self._most
        return min(self._most, int(self._size) // SMALLEST_CHUNK * SMALLEST_CHUNK)

    def pause(self) -> None:
        """Do not measure the time until the next operation ends."""
        self._last_s = None

    def took(self, *, steps: bool, chunk: int) -> None:
        """Note that an operation has ended.

        Args:
            steps: it had a step.
            chunk: positions of its longest chunk on any stage.
        """
        now_s = time.perf_counter()
        last_s, self._last_s = self._last_s, now_s
        if last_s is not None and steps:
            self._learn(now_s - last_s, chunk)

    def _learn(self, seconds: float, chunk: int) -> None:
        if not chunk:
            # A pause of the process is no property of a step.
            seconds = min(seconds, 3 * self.step_s) if self.step_s else seconds
            self.step_s += (seconds - self.step_s) * (_SMOOTHING if self.step_s else 1.0)
        elif self._target_s is not None and 2 * chunk > self._size:  # ends of prompts say little
            room_s = max(0.0, _MARGIN * self._target_s - self.step_s)
            fitting = chunk * room_s / max(seconds - self.step_s, 1e-6)
            fitting = min(max(fitting, 1.0), 2.0 * self._most)
            self._size = min(max((self._size * fitting) ** 0.5, SMALLEST_CHUNK), self._most)
