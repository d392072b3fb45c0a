"""Bytes that autograd and the pipeline hold for micro-batches in flight. Pure, no torch.

The terms are the tensors that `stagdist/model` saves for autograd and that DeepSpeed's pipeline engine keeps in its
buffers.
"""

from dataclasses import dataclass

from stagdist.config.parts import ModelConfig
from stagdist.parallel.layout import StageLayout, padded_vocab_size

FP32 = 4
INDEX = 8
"""Bytes of a token or label (int64)."""


@dataclass(frozen=True)
class BackwardMoment:
    """Bytes at one point of a backward pass.

    Attributes:
        activations: held for micro-batches in flight.
        buffers: temporary tensors, minus gradients that do not exist yet.
    """

    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.activations + self.buffers


@dataclass(frozen=True)
class StageActivations:
    """The activations of one rank of a stage.

    `busiest_moment` returns bytes; every private method returns bytes for one token of a micro-batch, unless its name
    says otherwise.

    Attributes:
        layout: what the stage holds.
        sequences: sequences of a micro-batch.
        length: tokens of a sequence.
        element: bytes of an activation.
        tensor: tensor-parallel size.
        fused_norm: RMSNorm is one kernel (CUDA); otherwise it is several operations, which save fp32 values.
        checkpoint_layers: only the input of each layer is kept.
    """

    model: ModelConfig
    layout: StageLayout
    sequences: int
    length: int
    element: int
    tensor: int
    fused_norm: bool
    checkpoint_layers: bool

    def busiest_moment(self, in_flight: int, new_gradients: int = 0) -> BackwardMoment:
        """The point of a forward and backward pass at which the stage holds the most bytes.

        Args:
            in_flight: micro-batches that have run forward only.
            new_gradients: bytes of gradients that this pass creates; 0 if an earlier pass created them.
        """
        tokens, layout = self.sequences * self.length, self.layout
        # A gradient of embedding or head before it is added to the earlier ones.
        matrix = self._vocabulary_entries() * self.model.hidden_size * self.element
        layers = sum(map(self._section, layout.sections)) * tokens
        pipe = self._pipe_buffers() * tokens
        received = 2 * self._carry() * tokens  # one activation and one gradient in transfer
        logits = self._vocabulary_entries() * self.element * tokens if layout.head else 0  # kept until the end
        always = (in_flight - 1) * (layers + pipe) + received + pipe + logits
        uses = self._embedding_uses()
        # One matrix has its gradient by then: the embedding for the first of its uses, or the head.
        waiting = matrix if uses > 1 or (new_gradients and layout.head) else 0
        embedding = min(uses, 2) * matrix + 2 * self.model.hidden_size * self.element * tokens
        moments = [
            # The last layer of the newest micro-batch: everything that its forward pass saved is still held.
            BackwardMoment(always + layers, self._layer_backward() * tokens + waiting - new_gradients),
            # The embedding, at the end: its dense gradient is added to those of its other uses on this stage.
            BackwardMoment(always, embedding),
        ]
        if layout.head:
            # The head: a gradient of the logits, and of the matrix before it is added to the earlier ones.
            cast = logits if self.element < FP32 else 0
            moments.append(BackwardMoment(always + layers + self._head() * tokens, matrix + cast - new_gradients))
        return max(moments, key=lambda moment: moment.total)

    def _norm(self) -> int:
        """One RMSNorm and its output, which the projections after it save."""
        width = self.model.hidden_size
        if self.fused_norm:
            return 2 * width * self.element + FP32
        # Input, and input over its root mean square, both in fp32; the reciprocal root; the output.
        return 2 * width * FP32 + FP32 + width * self.element

    def _attention(self, key_value_heads: int, masked: bool) -> int:
        """Rotated queries and keys, values, output and log-sum-exp of one attention, and the explicit mask, if any."""
        heads = 2 * self.model.num_attention_heads + 2 * key_value_heads
        log_sum = self.model.num_attention_heads // self.tensor * FP32
        mask = self.length * self.element // self.sequences if masked else 0
        return heads // self.tensor * self.model.head_width * self.element + log_sum + mask

    def _layer(self, section: int) -> int:
        """Everything that one layer of a section saves for its backward pass."""
        model = self.model
        mlp = 4 * model.intermediate_size // self.tensor * self.element  # gate before and after silu, up, their product
        kept = 2 * self._norm() + mlp + self._attention(model.key_value_heads, masked=False)
        if model.staggered and section > 0:
            window = model.cross_attention_window
            masked = window is not None and window < self.length
            kept += self._norm() + self._attention(model.cross_key_value_heads, masked)
        return kept

    def _section(self, section: int) -> int:
        """Everything that one section saves: layers, tokens and, if present, its shifted memory."""
        model, hidden = self.model, self.model.hidden_size * self.element
        kept = model.section_layers[section] * (hidden if self.checkpoint_layers else self._layer(section))
        if model.staggered or section == 0:
            kept += INDEX
        if model.staggered and section > 0:
            kept += self._norm()  # its output is replaced by the shifted copy of equal size
        if model.combine_sections:
            kept += hidden  # the output, kept for the gradient of its weight in the mix
        return kept

    def _layer_backward(self) -> int:
        """Gradients inside one layer and, with layer checkpointing, the recomputed layer."""
        gradients = (2 * self.model.intermediate_size // self.tensor + 3 * self.model.hidden_size) * self.element
        return gradients + (max(map(self._layer, self.layout.sections)) if self.checkpoint_layers else 0)

    def _head(self) -> int:
        """Final norm, fp32 softmax (fp32 logits are overwritten by it), mask and index of the label."""
        softmax = FP32 * self._vocabulary_entries() if self.element < FP32 else 0
        return self._norm() + softmax + 2 * INDEX + 1

    def _pipe_buffers(self) -> int:
        """What the pipeline engine holds for one micro-batch: its input, and its output until it is sent."""
        carry = self._carry()
        return (carry if self.layout.sections.start > 0 else INDEX) + (INDEX if self.layout.head else carry)

    def _carry(self) -> int:
        """What one stage sends to the next: hidden states, the accumulator with combined sections, and the tokens."""
        tensors = 2 if self.model.combine_sections else 1
        return tensors * self.model.hidden_size * self.element + (INDEX if self.model.staggered else 0)

    def _vocabulary_entries(self) -> int:
        return padded_vocab_size(self.model.vocab_size, self.tensor) // self.tensor

    def _embedding_uses(self) -> int:
        """Number of uses of the embedding's matrix in one pass over the stage."""
        lookups = len(self.layout.sections) if self.model.staggered else int(self.layout.sections.start == 0)
        return lookups + int(self.layout.tied_head)
