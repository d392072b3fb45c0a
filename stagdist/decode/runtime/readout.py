"""From section outputs to the next token: combination, head, sampling, and publishing the token."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.decode.layers.matrix import Int8Matrix, linear
from stagdist.decode.native.layer_math import FEW_ROWS, NativeMath
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.runtime.transport import TOKEN
from stagdist.decode.sampling.sampler import Choice, Sampler, merge_prompt_scores
from stagdist.decode.sampling.sampling_plan import Mode

SCORED_LOGITS = 1 << 22
"""Logits that exist at a time while prompts are scored, at most, or those of one position."""


class Readout:
    """Computes the next token on all ranks from the last hidden states.

    Attributes:
        logits: of this rank's slice of the vocabulary, between `head` and `choose`.
        sampler: chooses tokens; also knows the sampling parameters of every slot.
    """

    def __init__(self, setup: StageSetup):
        self._setup, self._weights = setup, setup.weights
        topology, weights = setup.topology, setup.weights
        self._sharded = topology.head == "sharded" and topology.num_stages > 1
        shares = self._holders = setup.tensor_size * (topology.num_stages if topology.head == "sharded" else 1)
        self.sampler = Sampler(
            num_slots=setup.limits.num_slots,
            vocab_size=setup.model.vocab_size,
            first_token=weights.first_token,
            num_tokens=0 if weights.head is None else len(weights.head),
            slice_size=-(-setup.model.vocab_size // shares),
            device=setup.device,
            want_margins=setup.want_margins,
            captured=setup.fixed,
            kernels=setup.kernels,
        )
        self._native: NativeMath | None = None
        if setup.native:
            self._native = NativeMath(setup.model, setup.tensor_size, None, setup.device.dtype)
        self._hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self._choice: Choice | None = None
        self._scores: Choice | None = None

    @property
    def choice(self) -> Choice:
        """The tokens chosen last, the same on every rank."""
        assert self._choice is not None, "no token was chosen yet"
        return self._choice

    def combine(self, outputs: dict[int, Tensor], root: int | None) -> None:
        """Sum the weighted section outputs, on stage `root` or on all stages. Shapes: [B, 1, H] each."""
        parts = []
        for section, weights in self._weights.sections.items():
            assert weights.mix is not None
            parts.append(weights.mix * outputs[section])
        partial = torch.stack(parts).sum(0)
        alone = self._setup.topology.num_stages == 1
        self._hidden = partial if alone else self._setup.link.sum_over_stages(partial, root)

    def ask(self, slots: Sequence[int]) -> None:
        """Announce the receive of the published tensor: the last output for a sharded head, else the choice."""
        shape: tuple[int, ...]
        if self._sharded:
            shape, dtype = (len(slots), 1, self._setup.model.hidden_size), self._setup.device.dtype
        elif (width := self._choice_width(slots)) == 1:
            shape, dtype = (len(slots),), torch.int64
        else:
            shape, dtype = (len(slots), width), torch.float64
        self._setup.link.tokens_in.expect(TOKEN, torch.empty(shape, dtype=dtype, device=self._setup.device.name))

    def share(self, last_output: Tensor | None) -> None:
        """Publish the last section's output to all stages. Shapes: [B, 1, H]; None on other stages."""
        if last_output is None:
            (self._hidden,) = self._setup.link.tokens_in.take(TOKEN)
            return
        self._hidden = last_output.contiguous()
        self._setup.link.publish(self._hidden)

    def head(self, last_output: Tensor | None) -> None:
        """Compute the logits of this rank's slice of the vocabulary."""
        hidden = last_output if self._hidden is None else self._hidden
        self._hidden = None
        assert hidden is not None
        self.logits = self.project(hidden[:, 0])

    def project(self, hidden: Tensor) -> Tensor:
        """Logits of this rank's slice. Shapes: [B, H] -> [B, slice]."""
        weights, eps = self._weights, self._setup.model.rms_norm_eps
        assert weights.head is not None and weights.output_norm is not None
        if self._native is not None and len(hidden) <= FEW_ROWS:
            return self._native.norm_linear(hidden, weights.output_norm, weights.head)
        if self._setup.kernels and isinstance(weights.head, Int8Matrix):
            from stagdist.decode.kernels.fused_math import normed_product  # imports triton

            return normed_product(hidden, weights.output_norm, eps, weights.head)
        return linear(F.rms_norm(hidden, weights.output_norm.shape, weights.output_norm, eps), weights.head)

    def choose(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Choose a token for each row, together with all ranks that hold a part of the head.

        Args:
            positions: of the tokens being chosen.
        """
        assert self.logits is not None
        logits, self.logits = self.logits, None
        self._choice = self.sampler.likeliest_alone(logits, slots)
        if self._choice is not None:
            return
        places = self._setup.device.upload(positions, torch.int64)
        candidates = self.sampler.candidates(logits, slots, places)
        gathered = candidates[None]
        if self._setup.transport is not None:
            gathered = self._setup.transport.gather(candidates, everywhere=self._sharded)
        self._choice = self.sampler.choose(gathered, slots, places)

    def choose_in_graph(self, mode: Mode, positions: Tensor) -> None:
        """As `choose`, of rows 0 to B - 1, with nothing from the host.

        Shapes: positions int64 [B], of the tokens being chosen; 0 for rows without a request.
        """
        assert self.logits is not None
        logits, self.logits = self.logits, None
        transport, gather = self._setup.transport, None
        if transport is not None and self._holders > 1:
            gather = partial(transport.gather, everywhere=self._sharded)
        self._choice = Choice(self.sampler.choose_in_graph(mode, logits, positions, gather))

    def publish(self) -> None:
        """Send the choice of the last stage to all stages."""
        choice = self.choice
        parts = [choice.tokens[:, None].double()]
        if choice.margins is not None:
            parts.append(choice.margins[:, None])
        if choice.logprobs is not None:
            parts.append(choice.logprobs)
        self._setup.link.publish(torch.cat(parts, dim=1) if len(parts) > 1 else choice.tokens)

    def receive(self) -> None:
        """Receive the choice of the last stage."""
        (message,) = self._setup.link.tokens_in.take(TOKEN)
        if message.dim() == 1:
            self._choice = Choice(message)
            return
        first = 1 + self._setup.want_margins
        self._choice = Choice(
            message[:, 0].long(),
            logprobs=message[:, first:] if message.shape[1] > first else None,
            margins=message[:, 1] if self._setup.want_margins else None,
        )

    # --- the tokens of a prompt ---------------------------------------------------------------------------------

    @property
    def scores(self) -> Choice:
        """The tokens scored last, and their log-probabilities, the same on every rank."""
        assert self._scores is not None, "no token was scored yet"
        return self._scores

    def ask_scores(self, length: int, targets: Tensor, count: int) -> None:
        """Announce the receive of the published tensor: the last outputs for a sharded head, else the scores.

        Args:
            length: positions of the chunk.
            count: likeliest tokens at each of them.
        """
        shape: tuple[int, ...] = len(targets), 1 + 2 * count
        dtype = torch.float64
        if self._sharded:
            shape, dtype = (1, length, self._setup.model.hidden_size), self._setup.device.dtype
        self._setup.link.tokens_in.expect(TOKEN, torch.empty(shape, dtype=dtype, device=self._setup.device.name))

    def score(self, last_output: Tensor | None, targets: Tensor, count: int) -> None:
        """Score the tokens that follow the positions of a chunk, together with all ranks that hold a part of the head.

        Shapes: last_output [1, S, H], targets int64 [T], T <= S.
        """
        hidden = last_output if self._hidden is None else self._hidden
        self._hidden = None
        assert hidden is not None
        parts, rows = [], max(1, SCORED_LOGITS // self._setup.model.vocab_size)
        for start in range(0, len(targets), rows):
            block = targets[start : start + rows]
            message = self.sampler.prompt_scores(self.project(hidden[0, start : start + len(block)]), block, count)
            gathered = message[None]
            if self._setup.transport is not None:
                gathered = self._setup.transport.gather(message, everywhere=self._sharded)
            parts.append(merge_prompt_scores(gathered, count))
        self._scores = Choice(targets, torch.cat(parts))

    def publish_scores(self) -> None:
        """Send the scores of the last stage to all stages."""
        assert self.scores.logprobs is not None
        self._setup.link.publish(self.scores.logprobs)

    def receive_scores(self, targets: Tensor) -> None:
        """Receive the scores of the last stage."""
        (message,) = self._setup.link.tokens_in.take(TOKEN)
        self._scores = Choice(targets, message)

    # --- inside -------------------------------------------------------------------------------------------------

    def _choice_width(self, slots: Sequence[int]) -> int:
        """Columns of a published choice: the token, its margin and log-probabilities, if these are computed."""
        num_logprobs = self.sampler.num_logprobs(slots)
        return 1 + self._setup.want_margins + (0 if num_logprobs is None else 1 + 2 * num_logprobs)
