"""What a measured number depends on in addition to its configuration: code, versions, hardware, other programs."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from stagdist.parallel.device import on_cuda
from stagdist.parallel.world import choose_device

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "deepspeed", "megatron-core")
DISTURBED = 0.05
"""A round in which other programs used more than this share of all cores is measured again."""
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Fields of /proc/stat: user, nice, system, irq, softirq, and steal (used by other virtual machines)."""


def conditions(device_name: str | None, devices: int) -> dict[str, object]:
    """Commit, versions and hardware; no name or path of this machine.

    Args:
        device_name: name of the GPU; None if CPUs did the work.
        devices: number of GPUs used.
    """
    return {
        "commit": commit(),
        "hardware": f"{usable_cores()} CPU cores" if device_name is None else f"{devices} x {device_name}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def device_of_ranks(choice: str) -> tuple[str, int, str | None]:
    """`parallel.device` of ranks on this host, the number of GPUs (0: none), and the name of the first GPU.

    Raises:
        ConfigError: there is no such device.
    """
    device = choose_device(choice)
    if not on_cuda(device):
        return "cpu", 0, None
    name = torch.cuda.get_device_name(device)
    return (device, 1, name) if ":" in choice else ("cuda", torch.cuda.device_count(), name)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def commit() -> str | None:
    """The commit checked out, with `+` if the code differs from it; None outside of a checkout."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "stagdist", "benchmarks/*.py")
        return _git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class OtherPrograms:
    """Share of this machine's cores that other programs used since the last reading.

    Args:
        total: sums a number over all processes of the benchmark on this machine.
        busy_s: core seconds that the machine has worked; None if unknown.
    """

    def __init__(self, total: Callable[[float], float], busy_s: Callable[[], float | None] | None = None):
        self._total, self._busy_s = total, busy_s or busy_core_seconds
        self._last = self._now()

    def share(self) -> float:
        """The share, 0 to 1; 0 if unknown."""
        before, self._last = self._last, self._now()
        wall_s, busy_s, own_s = (after - earlier for after, earlier in zip(self._last, before, strict=True))
        available_s = wall_s * (os.cpu_count() or 1)
        return max(0.0, busy_s - own_s) / available_s if busy_s and available_s else 0.0

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), self._busy_s() or 0.0, self._total(time.process_time())


def busy_core_seconds() -> float | None:
    """Core seconds that this machine has worked since it started; None without /proc."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    return sum(int(fields[index]) for index in BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
