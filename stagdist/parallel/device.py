"""What a rank does with its device: wait for it, and choose the kernels that run on it."""

import os

import torch


def on_cuda(device: str | torch.device) -> bool:
    """Whether `device` is a GPU."""
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has finished all its work. Work on a CPU is always finished."""
    if on_cuda(device):
        torch.cuda.synchronize(device)


def choose_attention(*, training: bool) -> None:
    """Choose the attention kernels of this process; does nothing without a GPU.

    cuDNN's kernels are the fastest for fixed shapes, as in training. In decoding the number of keys changes with every
    token, and cuDNN builds a new plan for each number, which takes tens of milliseconds on the host.

    Source: PyTorch issue 193893.
    """
    torch.backends.cuda.enable_cudnn_sdp(training)


def use_deterministic_kernels() -> None:
    """Make the results of this process repeatable bit by bit; call before CUDA is initialized.

    torch then refuses cuDNN's attention, whose backward pass it cannot make deterministic, uses the deterministic
    backward pass of the other attention kernels, and raises where an operation has no deterministic kernel.

    Source: torch.use_deterministic_algorithms; `check_cudnn_deterministic` in PyTorch's
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is created
    torch.use_deterministic_algorithms(True)
