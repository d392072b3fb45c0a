"""Tensors whose memory is a file, so that writing a large checkpoint does not need the memory for it."""

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

SMALL_BYTES = 1 << 20
"""Tensors up to this size stay in ordinary memory."""


class Scratch:
    """Makes tensors that live in files of a folder; a file has no name any more once it is mapped.

    Args:
        folder: on the file system that the result goes to, which has the room.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        count = prod(shape)
        size = count * torch.empty((), dtype=dtype).element_size()
        if size <= SMALL_BYTES:
            return torch.zeros(tuple(shape), dtype=dtype)
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=".scratch-")
        try:
            os.posix_fallocate(descriptor, 0, size)  # a full disk must be an error here, not a crash at a later write
            return torch.from_file(name, shared=True, size=count, dtype=dtype).reshape(tuple(shape))
        finally:
            os.close(descriptor)
            os.unlink(name)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values in a storage of their own."""
        target = self.zeros(tensor.shape, tensor.dtype)
        target.copy_(tensor)
        return target
