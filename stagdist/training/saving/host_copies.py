"""Copies of training state in host memory, from which files are written while training continues."""

import copy
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGE_BYTES = 2**20
"""Size from which a buffer is registered with CUDA: torch's pinned allocator rounds up to a power of two."""


class HostCopies:
    """Copies of training state in buffers that are kept from one save to the next.

    The first touch of fresh memory takes most of a copy's time: on a CPU 8 times as long as a copy into memory that
    was used before. The buffers are as large as what this rank saves, and pinned where the state is on a GPU. Call
    `close` before the object is dropped.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._registered: dict[tuple[str, int], Tensor] = {}
        self._on_cuda = False

    def copy(self, content: dict[str, Any], file: str) -> dict[str, Any]:
        """Copy a file's content as it is now; of each tensor only its own values, not the rest of its storage.

        A tensor that occurs twice is copied once. The copies are valid after `wait` and until the same file is copied
        again.
        """
        memo: dict[int, Any] = {}
        views: dict[tuple[object, ...], Tensor] = {}
        for tensor in _tensors(content):
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(),
                     tensor.dtype, tensor.requires_grad)  # fmt: skip
            if place not in views:
                views[place] = self._copy(tensor, (file, len(views)))
            memo[id(tensor)] = views[place]
        # A dictionary of the same type, without attributes: DeepSpeed's own copies drop a module's `_metadata` too.
        return copy.deepcopy(type(content)(content), memo)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._on_cuda:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Release the buffers. Copies stay valid as long as they are referenced."""
        self._buffers.clear()
        for key in list(self._registered):
            self._unregister(key)

    def _copy(self, tensor: Tensor, key: tuple[str, int]) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            self._unregister(key)
            buffer = self._buffers[key] = self._new_buffer(tensor, key)
        self._on_cuda |= tensor.is_cuda
        buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        return buffer.detach().requires_grad_(tensor.requires_grad)

    def _new_buffer(self, tensor: Tensor, key: tuple[str, int]) -> Tensor:
        if not tensor.is_cuda or tensor.nbytes < LARGE_BYTES:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        # Mapped memory shares no page with anything else; CUDA registers a page only once.
        pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
        self._registered[key] = buffer
        return buffer

    def _unregister(self, key: tuple[str, int]) -> None:
        buffer = self._registered.pop(key, None)
        if buffer is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))


def _tensors(content: object) -> Iterator[Tensor]:
    """Every tensor inside dictionaries, lists and tuples; other objects are copied by `deepcopy`."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)


class Capture:
    """Copies the files of one save to host memory.

    A failure is kept, not raised: a rank that raised in the middle of a save would leave the others waiting in
    DeepSpeed's barriers.
    """

    def __init__(self, copies: HostCopies):
        self._copies = copies
        self._failure: str | None = None
        self._files: list[tuple[Path, object]] = []

    def write(self, content: dict[str, Any], path: str) -> None:
        """Copy the content of one file."""
        if self._failure is not None:
            return
        try:
            self._files.append((Path(path), self._copies.copy(content, Path(path).name)))
        except (RuntimeError, MemoryError, OSError) as error:
            reason = str(error).partition("\n")[0]
            self._failure = (
                f"{path} could not be copied to host memory ({reason}); checkpoint.asynchronous: false needs no copy"
            )

    def files(self) -> list[tuple[Path, object]]:
        """Path and content of every file.

        Raises:
            OSError: something could not be copied.
        """
        if self._failure is not None:
            raise OSError(self._failure)
        self._copies.wait()
        return self._files
