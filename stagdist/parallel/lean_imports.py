"""Imports of frameworks without the unused modules that they load.

Some modules of megatron-core and DeepSpeed decorate functions with `torch.compile` when they are imported. We call none
of these functions, but the decorator alone loads torch's compiler, more than a second of processor time in every rank.
Others look whether wandb and tensorboard are there by importing them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, `torch.compile` leaves functions as they are."""

    def leave(model: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return (lambda function: function) if model is None else model

    compiler, torch.compile = torch.compile, leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


@contextmanager
def without_trackers() -> Iterator[None]:
    """Inside, what has not been imported before cannot be, which megatron-core takes for not installed."""
    names = [name for name in ("wandb", "tensorboard") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
