"""Which attention kernels torch chooses, and what a new number of keys costs the host."""

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from stagdist.parallel.device import choose_attention
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting
from tests.gpu.checks.timing import host_ms, wait

HEADS, WIDTH = 12, 128
LENGTHS = 12
MASKED = 512
PLAN_MS = 5.0
"""A first call that holds the host longer has made a plan or loaded a kernel."""
BACKENDS: dict[str, list[SDPBackend]] = {
    "default": [],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}


def attention(setting: Setting) -> Numbers:
    """Host time of the first and the second call for each number of keys, by backend, and the kernels chosen."""
    numbers: Numbers = {}
    choose_attention(training=True)
    for index, (name, backends) in enumerate(BACKENDS.items()):
        # Numbers of keys of its own, since plans of cuDNN stay for the whole process.
        numbers[name] = _probe(setting, backends, first_length=100 + 100 * index)
        setting.keep(numbers)
    plans = {name: numbers[name].get("later_lengths_first_call_ms") for name in ("default", "cudnn")}
    numbers["a_plan_for_every_length"] = {name: ms is not None and ms > PLAN_MS for name, ms in plans.items()}
    numbers["kernels_training"] = _kernels(setting)
    choose_attention(training=False)
    numbers["kernels_decoding"] = _kernels(setting)
    numbers["decoding"] = _probe(setting, [], first_length=700)
    if not setting.on_gpu:
        numbers["impossible"] = {"cudnn, efficient": NEEDS_GPU}
    chosen = [kernel for kernel in numbers["kernels_decoding"] if "cudnn" in kernel.lower()]
    assert not chosen, f"cuDNN attention is off, but these kernels ran: {chosen}"
    return numbers


def _inputs(setting: Setting, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as slices of a cache, which is how decoding calls it."""
    query = torch.randn(1, HEADS, queries, WIDTH, device=setting.device, dtype=torch.bfloat16)
    cache = torch.randn(2, 1, HEADS, 1024, WIDTH, device=setting.device, dtype=torch.bfloat16)
    return query, cache[0, :, :, :keys], cache[1, :, :, :keys]


def _mask(setting: Setting) -> torch.Tensor:
    return torch.arange(MASKED, device=setting.device)[None, None, None] < MASKED - 5


def _probe(setting: Setting, backends: list[SDPBackend], first_length: int) -> Numbers:
    first: list[float] = []
    second: list[float] = []
    numbers: Numbers = {"first_call_ms": first, "second_call_ms": second}
    try:
        for keys in range(first_length, first_length + LENGTHS):
            inputs = _inputs(setting, 1, keys)
            first.append(_call_ms(setting, backends, *inputs))
            second.append(_call_ms(setting, backends, *inputs))
        numbers["later_lengths_first_call_ms"] = statistics.median(first[1:])
        inputs, mask = _inputs(setting, 1, MASKED), _mask(setting)
        numbers["masked_ms"] = [_call_ms(setting, backends, *inputs, mask) for _ in range(2)]
    except RuntimeError as error:  # torch's answer to a backend that cannot do it
        numbers["unavailable"] = str(error).partition("\n")[0]
    return numbers


def _call_ms(setting: Setting, backends: list[SDPBackend], *inputs: Any) -> float:
    if not backends:
        return host_ms(setting.device, lambda: F.scaled_dot_product_attention(*inputs))
    with sdpa_kernel(backends):
        return host_ms(setting.device, lambda: F.scaled_dot_product_attention(*inputs))


def _kernels(setting: Setting) -> list[str]:
    """Names of the operators and kernels that attention runs, with and without a mask, for one query and for many."""
    calls = [_inputs(setting, queries, MASKED) for queries in (1, 128)]
    mask = _mask(setting)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * setting.on_gpu
    with profile(activities=activities) as profiler:
        for inputs in calls:
            F.scaled_dot_product_attention(*inputs)
            F.scaled_dot_product_attention(*inputs, mask)
        wait(setting.device)
    return sorted({event.name for event in profiler.events() or [] if not event.name.startswith("cuda")})
