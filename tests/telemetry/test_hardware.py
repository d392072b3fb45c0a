"""Peaks are found by the names torch gives, and unknown stays unknown."""

import resource
import subprocess
import sys

import numpy as np
import pytest

from stagdist.telemetry.hardware import DEVICE_PEAKS, memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "fp16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_devices(name: str, dtype: str, tflops: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (None, "fp32"),
        ("AMD EPYC 7763 64-Core Processor", "fp32"),
        ("NVIDIA GeForce GTX 1080", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("NVIDIA A1000 Laptop GPU", "bf16"),
    ],
)
def test_unknown_devices_have_no_peak(name: str | None, dtype: str) -> None:
    assert peak_flops(name, dtype) is None  # type: ignore[arg-type]


def test_matrix_units_are_at_least_twice_as_fast_as_vectors_in_the_whole_table() -> None:
    for peak in DEVICE_PEAKS:
        assert peak.source
        assert all(rate >= 2 * peak.fp32 for rate in (peak.bf16, peak.fp16) if rate is not None), peak


def test_memory_of_a_process_without_cuda_is_its_resident_memory() -> None:
    kind, before = memory_bytes()
    assert kind == "process_resident"
    block = np.ones(64 * 2**20, np.uint8)
    grown = memory_bytes()[1] - before
    assert 0.9 * block.nbytes < grown < 1.5 * block.nbytes
    assert memory_bytes()[1] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 1.1


def test_reading_memory_does_not_import_torch() -> None:
    code = "from stagdist.telemetry.hardware import *; memory_bytes(); import sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.gpu
def test_memory_with_cuda_in_use_is_the_peak_of_its_allocator() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.reset_peak_memory_stats()
    block = torch.ones(2**20, device="cuda")
    del block
    kind, size = memory_bytes()
    assert kind == "cuda_peak_allocated"
    assert size >= 4 * 2**20
