"""The message of rank 0 to all ranks before each operation."""

from dataclasses import asdict, dataclass
from enum import IntEnum

import msgpack
import torch
from torch import Tensor

from stagdist.decode.request import SamplingParams


class Operation(IntEnum):
    """The next operation of all ranks."""

    RUN = 0
    """A step, a chunk that enters the first stage, both, or neither while chunks are on their way to the last stage."""
    REST = 1
    """Complete all hand-offs and wait for the next message."""
    STOP = 2
    """Shut down."""
    REPORT = 3
    """Tell each other what the time was spent on, in the middle of work. A REST does it too."""


@dataclass(frozen=True)
class Chunk:
    """Positions `start` to `stop` - 1 of the prompt in a slot.

    Attributes:
        ends: they are the last ones.
    """

    slot: int
    start: int
    stop: int
    ends: bool = False


@dataclass(frozen=True)
class Admission:
    """A prompt that is assigned to a slot with its first chunk.

    Attributes:
        prompt_ids: all of it.
        source: slot whose caches hold the beginning of the prompt; it may be the same slot.
        reused: positions that they hold; 0 for none. The first chunk starts a lag before their end.
        moved_to: slot that first gets what the slot held before; the source: they are exchanged.
        moved: its positions.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    source: int = 0
    reused: int = 0
    moved_to: int | None = None
    moved: int = 0

    def encode(self) -> bytes:
        """Bytes for `decode`."""
        packed: bytes = msgpack.packb(
            [self.prompt_ids, asdict(self.params), self.source, self.reused, self.moved_to, self.moved]
        )
        return packed

    @staticmethod
    def decode(packed: bytes) -> "Admission":
        """Decode what `encode` returned."""
        prompt_ids, params, *places = msgpack.unpackb(packed, use_list=False)
        return Admission(prompt_ids, SamplingParams(**params), *places)


_FIELDS = 6


@dataclass(frozen=True)
class Control:
    """One message, applied by all ranks before the same operation. Its size is fixed, except for an admission.

    Attributes:
        step: one token for every slot that decodes.
        retired: slots to free before the operation.
        chunk: enters the first stage.
        admission: comes with the first chunk of a prompt.
    """

    operation: Operation
    step: bool = False
    retired: tuple[int, ...] = ()
    chunk: Chunk | None = None
    admission: Admission | None = None

    def encode(self, num_slots: int) -> tuple[Tensor, bytes]:
        """The message and the bytes of the admission, often none. Shapes: int64 [6 + num_slots]."""
        payload = b"" if self.admission is None else self.admission.encode()
        chunk = self.chunk or Chunk(-1, 0, 0)
        flags = [int(slot in self.retired) for slot in range(num_slots)]
        head = [2 * self.operation + self.step, chunk.slot, chunk.start, chunk.stop, chunk.ends, len(payload)]
        return torch.tensor([*head, *flags]), payload

    @staticmethod
    def payload_size(message: Tensor) -> int:
        """Bytes of the admission that follow a message."""
        size: int = message.tolist()[_FIELDS - 1]
        return size

    @staticmethod
    def decode(message: Tensor, payload: bytes) -> "Control":
        """Decode what `encode` returned."""
        kind, slot, start, stop, ends, _, *flags = message.tolist()
        return Control(
            Operation(kind // 2),
            bool(kind % 2),
            tuple(slot for slot, flag in enumerate(flags) if flag),
            None if slot < 0 else Chunk(slot, start, stop, bool(ends)),
            Admission.decode(payload) if payload else None,
        )
