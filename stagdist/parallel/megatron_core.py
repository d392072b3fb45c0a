"""The only door to megatron-core outside of data: what is used of it, imported without what is not.

Some of its modules decorate fused functions with `torch.compile` when they are imported. We call none of them, but the
decorator alone loads torch's compiler: a third of the time that a rank needs to start. Others look whether wandb and
tensorboard are there by importing them, an eighth of what is left.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Inside, `torch.compile` leaves functions as they are."""

    def leave(model: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return (lambda function: function) if model is None else model

    compiler, torch.compile = torch.compile, leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


@contextmanager
def _without_trackers() -> Iterator[None]:
    """Inside, what has not been imported before cannot be, which megatron-core takes for not installed."""
    names = [name for name in ("wandb", "tensorboard") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


with _without_compiler(), _without_trackers(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional GPU packages
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
        vocab_parallel_cross_entropy,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "parallel_state",
    "set_tensor_model_parallel_attributes",
    "vocab_parallel_cross_entropy",
]
