"""Is the machine ours? What other programs take of it while we measure."""

import os
import time
from collections.abc import Callable

DISTURBED = 0.05
"""A round in which others took more than this share of all cores is measured again."""
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Fields of /proc/stat: user, nice, system, irq, softirq, and what the hypervisor gave to other machines."""


class OtherPrograms:
    """Share of this machine's cores that other programs used since the last reading.

    Args:
        together: sums a number over all processes that measure on this machine.
        busy_s: core seconds that the whole machine has worked; None where it cannot be told.
    """

    def __init__(self, together: Callable[[float], float], busy_s: Callable[[], float | None] | None = None):
        self._together, self._busy_s = together, busy_s or busy_core_seconds
        self._last = self._now()

    def share(self) -> float:
        """The share, 0 to 1; 0 where it cannot be told."""
        before, self._last = self._last, self._now()
        wall_s, busy_s, own_s = (after - earlier for after, earlier in zip(self._last, before, strict=True))
        available_s = wall_s * (os.cpu_count() or 1)
        return max(0.0, busy_s - own_s) / available_s if busy_s and available_s else 0.0

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), self._busy_s() or 0.0, self._together(time.process_time())


def busy_core_seconds() -> float | None:
    """Core seconds that this machine has worked since it started; None without /proc."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            fields = stat.readline().split()[1:]
    except OSError:
        return None
    return sum(int(fields[index]) for index in BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
