"""Write a safetensors file tensor by tensor; the writer of the library needs twice the file size in memory.

Source: https://huggingface.co/docs/safetensors (format): length of the header, header as JSON, data without gaps.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stagdist.files import FileRecord
from stagdist.model.precision import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_BLOCK_BYTES = 1 << 22
"""Bytes that are hashed and written at a time."""


class SafetensorsWriter:
    """Writes and hashes one file. All tensors are declared first and then added in the same order.

    Args:
        path: the file; it is replaced if it exists.
        entries: name and shape of every tensor.
        dtype: dtype of all tensors.
        given_up: makes the next write fail once it is set.
    """

    def __init__(
        self,
        path: Path,
        entries: Sequence[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype,
        given_up: threading.Event | None = None,
    ):
        self.path, self.dtype, self._given_up = path, dtype, given_up
        self._waiting = list(reversed(entries))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, shape in entries:
            end = begin + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format requires aligned data
        self._digest, self._size = hashlib.sha256(), 0
        self._stream = path.open("wb")
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            OSError: the disk failed, or the write was given up.
        """
        expected, shape = self._waiting.pop()
        assert (expected, shape) == (name, tuple(tensor.shape)), f"{expected} {shape} is next, got {name}"
        for block in blocks(tensor.detach().cpu(), self.dtype):
            self._write(block)

    @property
    def full(self) -> bool:
        """Whether every tensor was added."""
        return not self._waiting

    def finish(self) -> FileRecord:
        """Wait until the file has reached the disk, and close it; returns its size and sha256."""
        assert self.full, f"{self.path}: {self._waiting[-1][0]} was not added"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return FileRecord(self._size, self._digest.hexdigest())

    def close(self) -> None:
        """Close a file that is not finished."""
        self._stream.close()

    def _write(self, block: memoryview) -> None:
        if self._given_up is not None and self._given_up.is_set():
            raise OSError("the write was given up")
        self._digest.update(block)
        self._stream.write(block)
        self._size += len(block)


def tensor_sha256(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """sha256 of the bytes of a tensor, rounded to `dtype` if one is given."""
    digest = hashlib.sha256()
    for block in blocks(tensor, dtype):
        digest.update(block)
    return digest.hexdigest()


def blocks(tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """The bytes of a tensor on the CPU, a few MB at a time, rounded to `dtype` if one is given."""
    values = tensor.contiguous().flatten()
    for block in values.split(_BLOCK_BYTES // values.element_size()):
        yield block.to(dtype or block.dtype).view(torch.uint8).numpy().data
