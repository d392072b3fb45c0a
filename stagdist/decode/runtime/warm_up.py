"""Launches the kernels of prefill and steps once before ranks wait for each other.

CUDA loads a kernel when it is launched for the first time, and waits for the device to drain before it does. A rank
that met a new kernel behind a receive would wait for its peer, and the peer for it.

Not every kernel is met here: a matrix product of another number of rows (the last chunk of a prompt may have any
length) or attention over another number of keys may use one that is loaded later. The rank then waits until its peers
have received what it sent. They do, because they need nothing of it before: all that follows a hand-off in its step,
the head and the choice of tokens, is launched here for every number of rows.
`tests/parallel/test_nccl_decoding.py` plays all of it.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.topology import Limits
from stagdist.parallel.grid import Grid
from stagdist.parallel.link import GLOO, Key

_PLAIN = SamplingParams(temperature=0.0)
_EVERYTHING = SamplingParams(
    temperature=0.7, top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=1, max_new_tokens=4
)
_NOISE = SamplingParams(temperature=0.7)
_PARAMS = (_PLAIN, _NOISE, _EVERYTHING)


class Unconnected(Transport):
    """The place of a rank without its peers: what would come is zero, what would go is dropped."""

    def __init__(self, grid: Grid, stage: int, tensor_rank: int):
        self.grid, self.stage, self.tensor_rank, self.step = grid, stage, tensor_rank, 0
        self.rules = GLOO  # no peer can keep this rank waiting
        self._expected: dict[Key, Tensor] = {}
        self._asked: Tensor | None = None

    def expect(self, key: Key, buffer: Tensor) -> None:
        """Keep the buffer, zeroed."""
        self._expected[key] = buffer.zero_()

    def arrived(self, key: Key) -> Tensor:
        """Zeros."""
        return self._expected.pop(key)

    def send(self, tensor: Tensor, in_flight: int) -> None:
        """Only make it contiguous, which is a kernel too."""
        tensor.contiguous()

    def finish_sends(self) -> None:
        """Nothing has been sent."""

    def wait_for_device(self, doing: str) -> None:
        """Nothing can be late."""

    def sum_over_stages(self, tensor: Tensor, root: int | None) -> Tensor:
        """This rank's part alone."""
        return tensor.contiguous()

    def publish(self, tensor: Tensor) -> None:
        """Drop it."""

    def ask(self, tensor: Tensor) -> None:
        """Keep the buffer, zeroed."""
        self._asked = tensor.zero_()

    def published(self) -> Tensor:
        """Zeros."""
        assert self._asked is not None
        return self._asked

    def gather(self, tensor: Tensor, *, everywhere: bool) -> Tensor:
        """This rank's part in the place of everyone's."""
        size = self.grid.world_size if everywhere else self.grid.tensor
        return tensor[None].expand(size, *tensor.shape).contiguous()

    def tensor_sum(self) -> Callable[[Tensor], Tensor] | None:
        """This rank's part alone."""
        return None if self.grid.tensor == 1 else lambda partial: partial


def dry_limits(limits: Limits) -> Limits:
    """Limits of a stage that only makes a dry pass: the shapes of the real one, with short caches."""
    return Limits(limits.num_slots, min(limits.max_context, 2 * limits.chunk_size + 8), limits.chunk_size)


@torch.inference_mode()
def dry_pass(stage: Stage) -> None:
    """Prefill prompts of one and of several chunks, and decode with every number of rows.

    Args:
        stage: made with `Unconnected` and `dry_limits`; it is of no other use.
    """
    limits = stage.limits
    longest = max(1, limits.max_context - 4)
    for params in _PARAMS:
        for length in dict.fromkeys((longest, min(limits.chunk_size, longest), 1)):
            stage.prefill(0, [0] * length, params)
            if length < limits.max_context:
                stage.step()
            stage.retire([0])
    _decode_every_size(stage, (1, 1))  # all rows at one position
    _decode_every_size(stage, (1, 2))
    stage.rest()


def _decode_every_size(stage: Stage, prompt_lengths: Sequence[int]) -> None:
    """Decode three times with all rows, then with one less at a time.

    Args:
        prompt_lengths: of even and odd slots.
    """
    limits, slots = stage.limits, range(stage.limits.num_slots)
    lengths = [min(prompt_lengths[slot % 2], limits.max_context) for slot in slots]
    room = limits.max_context - max(lengths)
    sizes = deque((limits.num_slots, limits.num_slots, *reversed([slot + 1 for slot in slots])))
    while sizes and room:
        for slot in range(sizes[0]):
            stage.prefill(slot, [0] * lengths[slot], _PARAMS[slot % 3])
        for _ in range(min(room, len(sizes))):
            stage.retire(range(sizes.popleft(), limits.num_slots))
            stage.step()
        stage.retire(slots)
