"""Write a safetensors file tensor by tensor; the writer of the library needs twice the file size in memory.

Source: https://huggingface.co/docs/safetensors (format): length of the header, header as JSON, data without gaps.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stagdist.model.precision import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_BLOCK_BYTES = 1 << 24


class SafetensorsWriter:
    """Writes one file. All tensors are declared first and then added in the same order.

    Args:
        path: the file; it is replaced if it exists.
        entries: name and shape of every tensor.
        dtype: dtype of all tensors.
    """

    def __init__(self, path: Path, entries: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self._waiting = list(reversed(entries))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.data_bytes = 0
        for name, shape in entries:
            end = self.data_bytes + torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self.data_bytes, end]}
            self.data_bytes = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format requires aligned data
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> str:
        """Write the next tensor; returns the sha256 of its bytes."""
        expected, shape = self._waiting.pop()
        assert (expected, shape) == (name, tuple(tensor.shape)), f"{expected} {shape} is next, got {name}"
        digest = hashlib.sha256()
        for block in _blocks(tensor.detach().to("cpu", self.dtype)):
            digest.update(block)
            self._stream.write(block)
        return digest.hexdigest()

    @property
    def full(self) -> bool:
        """Whether every tensor was added."""
        return not self._waiting

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of the bytes of a tensor, as returned by `SafetensorsWriter.add`."""
    digest = hashlib.sha256()
    for block in _blocks(tensor):
        digest.update(block)
    return digest.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    values = tensor.contiguous().flatten()
    for block in values.split(_BLOCK_BYTES // values.element_size()):
        yield block.view(torch.uint8).numpy().data
