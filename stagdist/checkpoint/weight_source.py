"""The interface of everything that weights can be read from, and of the progress of reading."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import ParameterSpec

Item = TypeVar("Item")
Track = Callable[[Sequence[Item], str], Iterable[Item]]
"""Iterates over items and shows the progress: (items, name of the work) -> items."""


def untracked(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Iterate without showing the progress."""
    return items


class WeightSource(Protocol):
    """Global parameters of a model, read one at a time."""

    @property
    def directory(self) -> Path:
        """The directory that they are read from."""

    @property
    def model(self) -> ModelConfig:
        """The configuration of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""

    @property
    def tokens(self) -> TextTokens | None:
        """The special tokens that the source states; None where only the tokenizer defines them."""

    def weight(self, spec: ParameterSpec) -> Tensor:
        """One global parameter of `model_parameters`, on the CPU."""

    def check(self) -> None:
        """Compare the files with their records; what was hashed while it was read is not read again.

        Raises:
            CheckpointError: a file differs; the message names it.
        """


def require_finite(tensor: Tensor, name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor.

    Args:
        dtype: to which it will be rounded.

    Raises:
        CheckpointError: it has values that are not finite, or that the dtype cannot represent.
    """
    low, high = torch.aminmax(tensor)  # allocates nothing; both are NaN if any value is
    largest = max(-low.item(), high.item(), key=lambda value: (math.isnan(value), value))
    if not math.isfinite(largest):
        raise CheckpointError(
            f"{name} in {directory} has values that are not finite; use an earlier checkpoint, or get it again"
        )
    if largest > torch.finfo(dtype).max:
        raise CheckpointError(
            f"{name} in {directory} has values up to {largest:.3g}, {dtype} ends at {torch.finfo(dtype).max:.3g}; "
            "choose fp32"
        )
    return tensor
