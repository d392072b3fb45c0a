"""From section outputs to the next token: combination, head, sampling, and publishing the token."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.sampler import Choice, Sampler


class Readout:
    """Computes the next token on all ranks from the last hidden states.

    Attributes:
        logits: of the last step, if the setup keeps them and this rank holds a part of the head.
    """

    def __init__(self, setup: StageSetup):
        self._setup, self._model, self._weights = setup, setup.model, setup.weights
        topology, weights = setup.topology, setup.weights
        self._sharded = topology.head == "sharded" and topology.num_stages > 1
        self._num_logprobs: dict[int, int] = {}
        shares = setup.tensor_size * (topology.num_stages if topology.head == "sharded" else 1)
        self.sampler = Sampler(
            num_slots=setup.limits.num_slots,
            vocab_size=setup.model.vocab_size,
            first_token=weights.first_token,
            num_tokens=0 if weights.head is None else len(weights.head),
            slice_size=-(-setup.model.vocab_size // shares),
            device=setup.device,
            want_margins=setup.want_margins,
        )
        self._hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self._choice: Choice | None = None

    @property
    def choice(self) -> Choice:
        """The tokens chosen last, the same on every rank."""
        assert self._choice is not None, "no token was chosen yet"
        return self._choice

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Assign a slot to a request."""
        if params.logprobs is not None:
            self._num_logprobs[slot] = params.logprobs
        self.sampler.admit(slot, params, prompt_ids)

    def retire(self, slot: int) -> None:
        """Free a slot."""
        self._num_logprobs.pop(slot, None)
        self.sampler.retire(slot)

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
        if self._sharded:
            shape = (len(slots), 1, self._model.hidden_size)
            self._setup.link.ask(torch.empty(shape, dtype=self._setup.device.dtype, device=self._setup.device.name))
            return
        width, _ = self._message_width(slots)
        dtype = torch.int64 if width == 1 else torch.float64
        shape = (len(slots), width) if width > 1 else (len(slots),)  # type: ignore[assignment]
        self._setup.link.ask(torch.empty(shape, dtype=dtype, device=self._setup.device.name))

    def share(self, last_output: Tensor | None) -> None:
        """Publish the last section's output to all stages. Shapes: [B, 1, H]; None on other stages."""
        if last_output is None:
            self._hidden = self._setup.link.published()
            return
        self._hidden = last_output.contiguous()
        self._setup.link.publish(self._hidden)

    def head(self, last_output: Tensor | None) -> None:
        """Compute the logits of this rank's slice of the vocabulary."""
        hidden = last_output if self._hidden is None else self._hidden
        self._hidden = None
        weights = self._weights
        assert hidden is not None and weights.head is not None and weights.output_norm is not None
        normed = F.rms_norm(hidden[:, 0], weights.output_norm.shape, weights.output_norm, self._model.rms_norm_eps)
        self.logits = F.linear(normed, weights.head)

    def choose(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Choose a token for each row, together with all ranks that hold a part of the head.

        Args:
            positions: of the tokens being chosen.
        """
        assert self.logits is not None
        alone = self.sampler.likeliest_alone(self.logits, slots)
        if alone is not None:
            self._choice = alone
            if not self._setup.keep_logits:
                self.logits = None
            return
        places = self._setup.device.upload(positions, torch.int64)
        candidates = self.sampler.candidates(self.logits, slots, places)
        if not self._setup.keep_logits:
            self.logits = None
        gathered = candidates[None]
        if self._setup.transport is not None:
            gathered = self._setup.transport.gather(candidates, everywhere=self._sharded)
        self._choice = self.sampler.choose(gathered, slots, places)
        self.sampler.observe(self._choice.tokens, slots)

    def publish(self, slots: Sequence[int]) -> None:
        """Send the choice of the last stage to all stages."""
        choice = self.choice
        parts = [choice.tokens[:, None].double()]
        if choice.margins is not None:
            parts.append(choice.margins[:, None])
        if choice.logprobs is not None:
            parts.append(choice.logprobs)
        self._setup.link.publish(torch.cat(parts, dim=1) if len(parts) > 1 else choice.tokens)

    def receive(self, slots: Sequence[int]) -> None:
        """Receive the choice of the last stage."""
        width, widest = self._message_width(slots)
        message = self._setup.link.published()
        if width == 1:
            self._choice = Choice(message, None, None)
            return
        self._choice = Choice(
            message[:, 0].long(),
            None if widest is None else message[:, 1 + self._setup.want_margins :],
            message[:, 1] if self._setup.want_margins else None,
        )

    def _message_width(self, slots: Sequence[int]) -> tuple[int, int | None]:
        """Columns of a published choice, and the largest number of log-probabilities requested."""
        widest = max((self._num_logprobs[slot] for slot in slots if slot in self._num_logprobs), default=None)
        return 1 + self._setup.want_margins + (0 if widest is None else 1 + 2 * widest), widest
