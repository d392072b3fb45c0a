"""Launches the kernels of prefill and decode steps once before ranks wait for each other.

CUDA loads a kernel at its first launch, after all enqueued work. Loading a kernel behind a receive could deadlock.

Steps that are captured run before their capture, with all ranks: what they load then waits for nothing that a peer has
not launched, because a receive in them is posted behind all that its sender may wait for.

A matrix product with another number of rows (the last chunk of a prompt) or attention over another number of keys may
load a kernel later. Loading then waits until the peers have received what this rank sent. They can, because everything
after a hand-off in its step (head, choice of tokens) is launched here for every number of rows.
`tests/parallel/test_nccl_decoding.py` simulates this.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.topology import Limits
from stagdist.parallel.grid import Grid
from stagdist.parallel.link import GLOO, Inbox, Key, Outbox

_PLAIN = SamplingParams(temperature=0.0)
_EVERYTHING = SamplingParams(
    max_new_tokens=4, temperature=0.7, top_k=4, top_p=0.9, min_p=0.01, logprobs=1, prompt_logprobs=1,
    repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias=((0, 1.0),), min_tokens=1,
    stop_token_ids=(0,), allowed_token_ids=(0, 1),
)  # fmt: skip
_NOISE = SamplingParams(temperature=0.7)
_TRUNCATED = SamplingParams(temperature=0.7, top_k=4, top_p=0.9)
_PARAMS = (_PLAIN, _NOISE, _EVERYTHING)


class _NoPeer(Inbox, Outbox):
    """An edge without a peer: receives return zeros, sends are dropped."""

    def __init__(self) -> None:
        self._buffers: dict[Key, tuple[Tensor, ...]] = {}

    def expect(self, key: Key, *buffers: Tensor, now: bool = False) -> None:
        self._buffers[key] = tuple(buffer.zero_() for buffer in buffers)

    def take(self, key: Key) -> tuple[Tensor, ...]:
        return self._buffers.pop(key)

    def send(self, *tensors: Tensor, in_flight: int) -> None:
        pass


class Unconnected(Transport):
    """A transport without peers."""

    def __init__(self, grid: Grid, stage: int, tensor_rank: int):
        self.grid, self.stage, self.tensor_rank, self.step = grid, stage, tensor_rank, 0
        self.rules = GLOO  # no peer can keep this rank waiting
        self.hand_offs_in = self.hand_offs_out = self.tokens_in = _NoPeer()
        self._tokens_out, self._outboxes = [], []

    def wait_for_device(self, doing: str, event: torch.cuda.Event | None = None) -> None:
        """Do nothing."""

    def sum_over_stages(self, tensor: Tensor, root: int | None) -> Tensor:
        """Return this rank's part."""
        return tensor.contiguous()

    def gather(self, tensor: Tensor, *, everywhere: bool) -> Tensor:
        """Repeat this rank's part for every rank."""
        size = self.grid.world_size if everywhere else self.grid.tensor
        return tensor[None].expand(size, *tensor.shape).contiguous()

    def tensor_sum(self) -> Callable[[Tensor], Tensor] | None:
        """Return this rank's part."""
        return None if self.grid.tensor == 1 else lambda partial: partial


def dry_limits(limits: Limits) -> Limits:
    """Return the limits for a dry pass: the same shapes with short caches."""
    return replace(limits, max_context=min(limits.max_context, 2 * limits.chunk_size + 8))


@torch.inference_mode()
def dry_pass(stage: Stage) -> None:
    """Prefill prompts of one and of several chunks, and decode with every number of rows.

    Args:
        stage: built with `Unconnected` and `dry_limits`, for this purpose only; or one that is going to serve, before
            its first operation and on all ranks together, so that the first request finds everything warm.
    """
    limits = stage.limits
    longest = max(1, dry_limits(limits).max_context - 4)
    for params in (*_PARAMS, _TRUNCATED):
        for length in dict.fromkeys((longest, min(limits.chunk_size, longest), 1)):
            stage.prefill(0, [0] * length, params)
            if length < limits.max_context:
                stage.run(step=True)
            stage.retire([0])
    _decode_every_size(stage, (1, 1))  # all rows at one position
    _decode_every_size(stage, (1, 2))
    stage.rest()


def _decode_every_size(stage: Stage, prompt_lengths: Sequence[int]) -> None:
    """Decode three times with all rows, then remove one row at a time.

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
            stage.run(step=True)
        stage.retire(slots)
