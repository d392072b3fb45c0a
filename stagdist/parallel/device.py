"""The device of a rank: which one it computes on, and what must be set before CUDA starts."""

import os
import re

import torch

from stagdist.errors import ConfigError

CHOICES = "auto, cpu, cuda or cuda:N"
HARDWARE_QUEUES = 32
"""Streams of a process that the GPU can run beside each other. The driver's default is 8."""

_CHOICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def choose_device(choice: str, local_rank: int = 0, *, option: str = "--device") -> str:
    """`cpu` or `cuda:N`.

    `auto` and `cuda` give every rank of a host a device of its own. `cuda:N` names one: ranks that name the same one
    share it, which NCCL allows for trials only (`NCCL_MULTI_RANK_GPU_ENABLE=1`, NCCL 2.30 or newer).

    Args:
        choice: `auto`, `cpu`, `cuda` or `cuda:N`.
        option: what the user wrote the choice into, for messages.

    Raises:
        ConfigError: the choice is none, there is no such device, or a host has more ranks than devices.
    """
    if not _CHOICE.fullmatch(choice):
        raise ConfigError(f"{option} is {choice!r}; give {CHOICES}")
    if choice == "cpu":
        return "cpu"
    os.environ.setdefault(_QUEUES, str(HARDWARE_QUEUES))  # the driver reads it when CUDA starts
    if not torch.cuda.is_available():
        if choice == "auto":
            return "cpu"
        raise ConfigError(f"{option} is {choice}, but torch sees no CUDA device; use auto or cpu")
    count = torch.cuda.device_count()
    if ":" in choice:
        index = int(choice.partition(":")[2])
        if index >= count:
            raise ConfigError(f"{option} is {choice}, but torch sees {count} CUDA devices, cuda:0 to cuda:{count - 1}")
        return f"cuda:{index}"
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no device of its own, torch sees {count}; start at most {count} processes on "
            f"this host, or set {option} to cpu"
        )
    return f"cuda:{local_rank}"


def require_hardware_queues() -> None:
    """Refuse one hardware queue for ranks that exchange messages.

    Raises:
        ConfigError: CUDA_DEVICE_MAX_CONNECTIONS is 1.
    """
    if os.environ.get(_QUEUES, "").strip() == "1":
        raise ConfigError(
            f"{_QUEUES} is 1 (Megatron-LM's scripts set this). With one hardware queue, a pending receive blocks every "
            "later kernel, including the send that its peer needs, so ranks would deadlock. Unset it (stagdist then "
            f"uses {HARDWARE_QUEUES})"
        )


def on_cuda(device: str | torch.device) -> bool:
    """Whether `device` is a GPU."""
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has done all its work; the work of a CPU is done already."""
    if on_cuda(device):
        torch.cuda.synchronize(device)


def choose_attention(*, training: bool) -> None:
    """Choose the attention kernels of this process; does nothing where there is no GPU.

    cuDNN's are the fastest for shapes that stay the same, as in training. While decoding every token has a new number
    of keys, and cuDNN makes a new plan for each, which takes the host tens of milliseconds.

    Source: PyTorch issue 193893.
    """
    torch.backends.cuda.enable_cudnn_sdp(training)


def use_deterministic_kernels() -> None:
    """Let this process repeat its results exactly; call before CUDA starts.

    torch then refuses cuDNN's attention, whose backward pass it cannot make deterministic, uses the deterministic
    backward pass of the other attention kernels, and raises where an operation has no deterministic kernel.

    Source: torch.use_deterministic_algorithms; `check_cudnn_deterministic` in PyTorch's
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
    torch.use_deterministic_algorithms(True)
