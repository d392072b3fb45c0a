"""Time of work on the device, and memory bandwidth."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.decoding.site import read_bandwidth
from stagdist.parallel.device import on_cuda
from tests.gpu.checks.setting import Numbers, Setting

READ_BYTES = {True: 1 << 32, False: 1 << 22}
"""Size of the buffer that is read, on a GPU and in a rehearsal. 4 GiB hide the start of a kernel."""


def device_ms(device: str, work: Callable[[], object], *, repeats: int = 5, calls: int = 1) -> float:
    """Milliseconds of one call of `work`: by CUDA events on a GPU, by the host's clock on a CPU.

    Args:
        repeats: measurements, of which the median is returned, after one that is not counted.
        calls: calls in a measurement, one right after the other.
    """
    times = []
    for _ in range(repeats + 1):
        if on_cuda(device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        else:
            began = time.perf_counter()
            for _ in range(calls):
                work()
            times.append(1e3 * (time.perf_counter() - began) / calls)
    return statistics.median(times[1:])


def host_ms(device: str, work: Callable[[], object]) -> float:
    """Milliseconds until the host returns from one call of `work`, on a device that had nothing to do."""
    wait(device)
    began = time.perf_counter()
    work()
    elapsed = 1e3 * (time.perf_counter() - began)
    wait(device)
    return elapsed


def wait(device: str) -> None:
    """Until the device has done all its work."""
    if on_cuda(device):
        torch.cuda.synchronize(device)


def bandwidths(setting: Setting) -> Numbers:
    """Memory bandwidth in TB/s: `read_tb_s`, and `copy_tb_s`, which counts bytes read and written."""
    buffer = torch.ones(READ_BYTES[setting.on_gpu] // 4, device=setting.device)
    read_bandwidth(buffer, repeats=1)  # loads the kernel
    target = torch.empty_like(buffer)
    copying_ms = device_ms(setting.device, lambda: target.copy_(buffer))
    return {"read_tb_s": read_bandwidth(buffer) / 1e12, "copy_tb_s": 2 * buffer.nbytes / copying_ms / 1e9}
