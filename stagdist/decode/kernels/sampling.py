"""Launches of the kernels that choose tokens inside a captured step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from stagdist.decode.kernels.scores import likeliest_kernel, merge_kernel, score_kernel
from stagdist.decode.kernels.truncation import PIVOTS, STATE, narrow_kernel, pick_kernel

Gather = Callable[[Tensor], Tensor]

PASSES = 10
"""Passes that narrow the interval of truncation. They suffice for top-k or top-p of 262144 tokens, and for both where
top-k is at most some thousands; what is left then is done by the last kernel, slowly."""
MOST_BLOCKS = 128
"""Blocks of a row in these passes, at most: every program reads the results of all of them."""
CHUNK = 256
"""Tokens that a program compares with all pivots at a time, at most: one for each of its threads."""
EXACT = {"enable_fp_fusion": False, "num_warps": 8}
"""Options of kernels that compute scores: a product and a sum are rounded one after the other, as in the plain path."""


@dataclass(frozen=True)
class SamplingTables:
    """Memory of all slots, which stays in place.

    Attributes:
        table: parameters, int64 [slots, columns], in the order of `kernels.scores`.
        may_end: position from which a token may end the output, int64 [slots].
        ends: tokens that would end it, bool [slots, V].
        bias: of logits, float32 [slots, V].
        seen: tokens in the prompt or output, bool [slots, V].
        counts: how often tokens were generated, int32 [slots, V].
    """

    table: Tensor
    may_end: Tensor
    ends: Tensor
    bias: Tensor
    seen: Tensor
    counts: Tensor


class SamplingKernels:
    """Chooses tokens of slots 0 to B - 1 from a slice of the logits.

    Every method launches the same kernels for any values on the device. Messages are float64 [number, B, 2], a
    score and an id; `gather` stacks those of all ranks, [B, 2] -> [R, B, 2], and is None for one rank. With it, one
    kernel more merges the messages of the ranks.

    Args:
        first_token: id of the first token of the slice.
        size: tokens of the slice.
        block: tokens of a program.
        passes: of truncation.
    """

    def __init__(
        self,
        state: SamplingTables,
        first_token: int,
        size: int,
        vocab_size: int,
        *,
        block: int = 1024,
        passes: int = PASSES,
    ) -> None:
        self._state, self._first, self._size, self._vocab_size = state, first_token, size, vocab_size
        self._ends, self._seen = state.ends.view(torch.uint8), state.seen.view(torch.uint8)
        self._block, self._passes = block, passes
        self._search_block = max(block, triton.next_power_of_2(triton.cdiv(size, MOST_BLOCKS)))

    def greedy(self, logits: Tensor, gather: Gather | None) -> Tensor:
        """The likeliest tokens: 2 kernels. Shapes: logits [B, V] -> int64 [B]."""
        rows = len(logits)
        messages = self._messages(logits, self._block)
        likeliest_kernel[rows, len(messages)](
            logits, messages, logits.stride(0), self._size, self._first, rows, self._vocab_size, BLOCK=self._block
        )
        return self._merge(messages, None, gather)

    def sampled(self, logits: Tensor, positions: Tensor, gather: Gather | None) -> Tensor:
        """Tokens by temperature, noise, penalties and bias: 2 kernels. Shapes: as `greedy`; positions int64 [B]."""
        return self._merge(self._score(logits, positions, None), positions, gather)

    def truncated(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The same with top-k, top-p and min-p, of all tokens on one rank: 3 kernels and one for each pass."""
        rows, device = len(logits), logits.device
        scores = torch.empty(rows, self._size, dtype=torch.float64, device=device)
        score_messages = self._score(logits, positions, scores)
        messages = self._messages(logits, self._search_block)
        blocks, number = len(messages), len(score_messages)
        states = torch.empty(2, rows, STATE.value, dtype=torch.float64, device=device)
        partials = torch.empty(2, rows, blocks, 3, PIVOTS.value, dtype=torch.float64, device=device)
        sizes = {
            "COUNT": triton.next_power_of_2(number),
            "BLOCKS": triton.next_power_of_2(blocks),
            "BLOCK": self._search_block,
            "CHUNK": min(self._search_block, CHUNK),
        }
        for number_of_pass in range(self._passes):
            before, after = (number_of_pass + 1) % 2, number_of_pass % 2
            narrow_kernel[rows, blocks](
                scores, self._state.table, score_messages, states[before], partials[before],
                states[after], partials[after], number, self._size, rows, blocks,
                FIRST=number_of_pass == 0, **sizes, **EXACT,
            )  # fmt: skip
        last = (self._passes - 1) % 2
        pick_kernel[rows, blocks](
            scores, self._state.table, positions, score_messages, states[last], partials[last], messages,
            number, self._size, self._first, rows, self._vocab_size, blocks, **sizes, **EXACT,
        )  # fmt: skip
        return self._merge(messages, positions, None)

    def _messages(self, logits: Tensor, block: int) -> Tensor:
        """Memory for a message of each block. A slice without tokens has one, too."""
        return logits.new_empty(max(1, triton.cdiv(self._size, block)), len(logits), 2, dtype=torch.float64)

    def _score(self, logits: Tensor, positions: Tensor, scores: Tensor | None) -> Tensor:
        messages, state, rows = self._messages(logits, self._block), self._state, len(logits)
        score_kernel[rows, len(messages)](
            logits, positions, state.table, state.may_end, self._ends, state.bias, self._seen, state.counts,
            scores, messages, logits.stride(0), self._size, self._first, rows, self._vocab_size,
            BLOCK=self._block, **EXACT,
        )  # fmt: skip
        return messages

    def _merge(self, messages: Tensor, positions: Tensor | None, gather: Gather | None) -> Tensor:
        """The token of each row from messages of blocks. Penalties see it where positions are given."""
        rows = messages.shape[1]
        if gather is not None:
            merged = messages.new_empty(rows, 2)
            self._launch_merge(messages, merged, None, None)
            messages = gather(merged)
        tokens = torch.empty(rows, dtype=torch.int64, device=messages.device)
        self._launch_merge(messages, None, tokens, positions)
        return tokens

    def _launch_merge(
        self, messages: Tensor, merged: Tensor | None, tokens: Tensor | None, positions: Tensor | None
    ) -> None:
        number, rows, _ = messages.shape
        merge_kernel[rows,](
            messages, merged, tokens, positions, self._state.table, self._seen, self._state.counts,
            number, rows, self._size, self._first, self._vocab_size,
            COUNT=triton.next_power_of_2(number), RECORDS=positions is not None,
        )  # fmt: skip
