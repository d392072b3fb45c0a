"""Peak performance of a device, and memory that this process holds."""

import re
import sys
from typing import Literal, NamedTuple

import psutil

Precision = Literal["bf16", "fp16", "fp32"]


class DevicePeak(NamedTuple):
    """Peak dense TFLOP/s of one device as torch counts devices (one die of an MI250X is one device).

    `bf16` and `fp16` are matrix-unit rates with fp32 accumulation and without sparsity; `fp32` is the plain vector
    rate, because torch leaves TF32 off for matrix products by default.
    """

    pattern: str
    bf16: float | None
    fp16: float | None
    fp32: float
    source: str


DEVICE_PEAKS: tuple[DevicePeak, ...] = (
    DevicePeak(r"\bGB200\b", 2500.0, 2500.0, 80.0, "NVIDIA GB200 NVL72 datasheet, per GPU, halved for dense"),
    DevicePeak(r"\bB200\b", 2250.0, 2250.0, 75.0, "NVIDIA HGX B200 datasheet, one of eight, halved for dense"),
    DevicePeak(r"\bH200 NVL\b", 835.5, 835.5, 60.0, "NVIDIA H200 datasheet (NVL), halved for dense"),
    DevicePeak(r"\bH200\b", 989.5, 989.5, 67.0, "NVIDIA H200 datasheet (SXM), halved for dense"),
    DevicePeak(r"\bH100 PCIe\b", 756.5, 756.5, 51.0, "NVIDIA H100 datasheet (PCIe), halved for dense"),
    DevicePeak(r"\bH100 NVL\b", 835.5, 835.5, 60.0, "NVIDIA H100 datasheet (NVL), halved for dense"),
    DevicePeak(r"\bH100\b", 989.5, 989.5, 67.0, "NVIDIA H100 datasheet (SXM), halved for dense"),
    DevicePeak(r"\bA100\b", 312.0, 312.0, 19.5, "NVIDIA A100 datasheet"),
    DevicePeak(r"\bA40\b", 149.7, 149.7, 37.4, "NVIDIA A40 datasheet"),
    DevicePeak(r"\bA30\b", 165.0, 165.0, 10.3, "NVIDIA A30 datasheet"),
    DevicePeak(r"\bA10\b", 125.0, 125.0, 31.2, "NVIDIA A10 datasheet"),
    DevicePeak(r"\bL40S\b", 362.0, 362.0, 91.6, "NVIDIA L40S datasheet"),
    DevicePeak(r"\bL40\b", 181.0, 181.0, 90.5, "NVIDIA L40 datasheet"),
    DevicePeak(r"\bL4\b", 121.0, 121.0, 30.3, "NVIDIA L4 datasheet, halved for dense"),
    DevicePeak(r"\bV100S\b", None, 130.0, 16.4, "NVIDIA V100 datasheet (V100S PCIe); it has no bf16 unit"),
    DevicePeak(r"\bV100-PCIE\b", None, 112.0, 14.0, "NVIDIA V100 datasheet (PCIe); it has no bf16 unit"),
    DevicePeak(r"\bV100\b", None, 125.0, 15.7, "NVIDIA V100 datasheet (SXM2); it has no bf16 unit"),
    DevicePeak(r"\bT4\b", None, 65.0, 8.1, "NVIDIA T4 datasheet; it has no bf16 unit"),
    DevicePeak(r"\bMI3(00|25)X\b", 1307.4, 1307.4, 163.4, "AMD Instinct MI300X and MI325X datasheets"),
    DevicePeak(r"\bMI300A\b", 980.6, 980.6, 122.6, "AMD Instinct MI300A datasheet"),
    DevicePeak(r"\bMI250X\b", 191.5, 191.5, 23.9, "AMD Instinct MI250X datasheet, one of its two dies"),
)
"""Looked through from the top; the first pattern found in the name of the device counts."""


def peak_flops(device_name: str | None, dtype: Precision) -> float | None:
    """Peak dense FLOP/s of a device, or None where it is not known.

    Not known are CPUs, devices missing from the table, precisions the device has no unit for, and slices of a GPU
    (MIG), whose share the name does not give.

    Args:
        device_name: as `torch.cuda.get_device_name()` returns it; None for a CPU.
        dtype: precision of the matrix products.
    """
    if device_name is None or re.search(r"\bMIG\b", device_name):
        return None
    for peak in DEVICE_PEAKS:
        if re.search(peak.pattern, device_name, flags=re.IGNORECASE):
            tflops: float | None = getattr(peak, dtype)
            return None if tflops is None else tflops * 1e12
    return None


def memory_bytes() -> tuple[str, int]:
    """Which measure of this process's memory is available, and its bytes.

    `cuda_peak_allocated`, where torch has initialized CUDA in this process: the peak of its allocator on the current
    device. Otherwise `process_resident`.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        return "cuda_peak_allocated", torch.cuda.max_memory_allocated()
    return "process_resident", psutil.Process().memory_info().rss
