"""What a measured number depends on besides its configuration: code, versions, hardware."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "deepspeed", "megatron-core")


def conditions(device_name: str | None, devices: int) -> dict[str, object]:
    """Commit, versions and hardware of a measurement, without a name or path of this machine.

    Args:
        device_name: the GPU's; None where CPUs did the work.
        devices: GPUs that took part.
    """
    return {
        "commit": commit(),
        "hardware": f"{usable_cores()} CPU cores" if device_name is None else f"{devices} x {device_name}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def device_of_ranks(choice: str) -> tuple[str, int, str | None]:
    """The `parallel.device` of ranks on this host, how many GPUs it gives them (0: none), and the name of the first.

    Args:
        choice: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    from stagdist.parallel.device import on_cuda
    from stagdist.parallel.world import choose_device

    device = choose_device(choice)
    if not on_cuda(device):
        return "cpu", 0, None
    name = torch.cuda.get_device_name(device)
    return (device, 1, name) if ":" in choice else ("cuda", torch.cuda.device_count(), name)


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """The commit checked out, with `+` where the package differs from it; None outside of a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", "stagdist") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
