"""What is installed, what the device is, and whether everything can be imported."""

import ctypes
import importlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stagdist.parallel.device import choose_attention
from tests.gpu.checks.setting import Numbers, Setting
from tests.gpu.checks.timing import bandwidths

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "deepspeed", "megatron-core", "pydantic")
MODULES = ("stagdist.training.pretrain", "stagdist.decode.engine", "stagdist.decode.runtime.build")


def environment(setting: Setting) -> Numbers:
    """Versions, device, memory bandwidth, and the import of every entry point."""
    numbers: Numbers = {"versions": versions(), "device": _device(setting)}
    setting.keep(numbers)
    numbers |= bandwidths(setting)
    numbers["cudnn_sdp_before"] = torch.backends.cuda.cudnn_sdp_enabled()
    choose_attention(training=False)
    numbers["cudnn_sdp_while_decoding"] = torch.backends.cuda.cudnn_sdp_enabled()
    setting.keep(numbers)
    entry_points = sorted(f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py"))
    numbers["import_s"] = {}
    for module in (*MODULES, *entry_points):
        began = time.perf_counter()
        importlib.import_module(module)
        numbers["import_s"][module] = time.perf_counter() - began
    assert not numbers["cudnn_sdp_while_decoding"], "choose_attention(training=False) leaves cuDNN attention on"
    return numbers


def versions() -> dict[str, str | None]:
    """Of Python, packages and CUDA's libraries; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    on_gpu = torch.cuda.is_available()
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if on_gpu else None
    found["nccl of torch"] = ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None
    loaded = loaded_nccl()
    found["nccl loaded"] = None if loaded is None else ".".join(map(str, loaded))
    return found


def loaded_nccl() -> tuple[int, int, int] | None:
    """Version of the NCCL library in this process; None where torch holds none, or one that is linked statically.

    `torch.cuda.nccl.version()` is that of the headers which torch was compiled with; a library that was preloaded is
    another.
    """
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return None
    code = ctypes.c_int()
    status = library.ncclGetVersion(ctypes.byref(code))
    assert status == 0, f"ncclGetVersion returns {status}"
    return code.value // 10000, code.value // 100 % 100, code.value % 100


def _device(setting: Setting) -> Numbers:
    if not setting.on_gpu:
        return {"name": "CPU", "cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": setting.gpus,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
