"""Copies of training state in host memory, from which files are written while training continues."""

import mmap
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stagdist.checkpoint.training.writer import OwnedFragment


class HostCopies:
    """One buffer for all that a rank saves, kept from one save to the next, and pinned where the state is on a GPU.

    The first touch of fresh memory takes most of a copy's time: on a CPU 8 times as long as a copy into memory that
    was used before. Call `close` before the object is dropped.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._registered = False

    def copy(self, fragments: Sequence[OwnedFragment]) -> list[OwnedFragment]:
        """Copy the values as they are now. The copies are valid until the next call.

        Raises:
            OSError: there is not enough memory.
        """
        held = [values for fragment in fragments for values in fragment.tensors.values()]
        if not held:
            return list(fragments)
        on_cuda = any(values.is_cuda for values in held)
        try:
            self._make(sum(values.numel() for values in held), on_cuda)
            pieces = iter(self._buffer.split([values.numel() for values in held]))
            copies = [
                replace(
                    one,
                    tensors={
                        kind: next(pieces).copy_(values.detach(), non_blocking=on_cuda)
                        for kind, values in one.tensors.items()
                    },
                )
                for one in fragments
            ]
            if on_cuda:
                torch.cuda.current_stream().synchronize()
        except (RuntimeError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            raise OSError(
                f"the state could not be copied to host memory ({reason}); checkpoint.asynchronous: false needs no copy"
            ) from error
        return copies

    def close(self) -> None:
        """Release the buffer. Copies stay valid as long as they are referenced, but are not pinned any more."""
        if self._registered:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
        self._buffer, self._registered = torch.empty(0), False

    def _make(self, numel: int, pinned: bool) -> None:
        if self._buffer.numel() == numel and self._registered == pinned:
            return
        self.close()
        self._buffer = _pages(numel) if pinned else torch.empty(numel)
        if pinned:  # torch's pinned allocator would round up to a power of two
            buffer = self._buffer
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
            self._registered = True


def _pages(numel: int) -> Tensor:
    """Mapped memory shares no page with anything else; CUDA registers a page only once."""
    return torch.frombuffer(mmap.mmap(-1, numel * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.float32)
