"""Bytes that autograd and the pipeline hold for micro-batches in flight. Pure, no torch.

The terms are the tensors that `stagdist/model` saves for autograd and that DeepSpeed's pipeline engine keeps in its
buffers. A function whose name ends in `per_token` returns bytes for one token of a micro-batch, on one rank.
"""

from dataclasses import dataclass

from stagdist.config.parts import ModelConfig
from stagdist.parallel.layout import StageLayout, padded_vocab_size

FP32 = 4
INDEX = 8
"""Bytes of a token or label (int64)."""


@dataclass(frozen=True)
class ActivationSetting:
    """What the sizes depend on, in addition to the model.

    Attributes:
        sequences: sequences of a micro-batch.
        length: tokens of a sequence.
        element: bytes of an activation.
        tensor: tensor-parallel size.
        fused_norm: RMSNorm is one kernel (CUDA); otherwise it is several operations, which save fp32 values.
        checkpoint_layers: only the input of each layer is kept.
    """

    sequences: int
    length: int
    element: int
    tensor: int
    fused_norm: bool
    checkpoint_layers: bool

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequences * self.length


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


def busiest_moment(
    model: ModelConfig, layout: StageLayout, setting: ActivationSetting, in_flight: int, new_gradients: int = 0
) -> BackwardMoment:
    """The point of a forward and backward pass at which a stage holds the most bytes.

    Args:
        in_flight: micro-batches that have run forward only.
        new_gradients: bytes of gradients that this pass creates; 0 if an earlier pass created them.
    """
    tokens, matrix = setting.tokens, _vocabulary_matrix(model, setting)
    layers = sum(section_per_token(model, setting, section) for section in layout.sections) * tokens
    pipe = pipe_buffers_per_token(model, layout, setting) * tokens
    received = 2 * _carry_per_token(model, setting) * tokens  # one activation and one gradient in transfer
    logits = logits_per_token(model, setting) * tokens if layout.head else 0  # kept until the end of the backward pass
    always = (in_flight - 1) * (layers + pipe) + received + pipe + logits
    uses = _embedding_uses(model, layout)
    # One matrix has its gradient by then: the embedding for the first of its uses, or the head.
    waiting = matrix if uses > 1 or (new_gradients and layout.head) else 0
    backward = layer_backward_per_token(model, layout, setting) * tokens
    moments = [
        # The last layer of the newest micro-batch: everything that its forward pass saved is still held.
        BackwardMoment(always + layers, backward + waiting - new_gradients),
        # The embedding, at the end: its dense gradient is added to those of its other uses on this stage.
        BackwardMoment(always, min(uses, 2) * matrix + 2 * model.hidden_size * setting.element * tokens),
    ]
    if layout.head:
        # The head: a gradient of the logits, and of the matrix before it is added to the earlier ones.
        head = head_per_token(model, setting) * tokens
        cast = logits if setting.element < FP32 else 0
        moments.append(BackwardMoment(always + layers + head, matrix + cast - new_gradients))
    return max(moments, key=lambda moment: moment.total)


def norm_per_token(model: ModelConfig, setting: ActivationSetting) -> int:
    """One RMSNorm and its output, which the projections after it save."""
    width, element = model.hidden_size, setting.element
    if setting.fused_norm:
        return 2 * width * element + FP32
    # Input, and input over its root mean square, both in fp32; the reciprocal root; the output.
    return 2 * width * FP32 + FP32 + width * element


def attention_per_token(model: ModelConfig, setting: ActivationSetting, key_value_heads: int, masked: bool) -> int:
    """Rotated queries and keys, values, output and log-sum-exp of one attention, and the explicit mask, if any."""
    heads = 2 * model.num_attention_heads + 2 * key_value_heads
    log_sum = model.num_attention_heads // setting.tensor * FP32
    mask = setting.length * setting.element // setting.sequences if masked else 0
    return heads // setting.tensor * model.head_width * setting.element + log_sum + mask


def mlp_per_token(model: ModelConfig, setting: ActivationSetting) -> int:
    """Gate before and after silu, up, and their product."""
    return 4 * model.intermediate_size // setting.tensor * setting.element


def layer_per_token(model: ModelConfig, setting: ActivationSetting, section: int) -> int:
    """Everything that one layer of a section saves for its backward pass."""
    kept = 2 * norm_per_token(model, setting) + mlp_per_token(model, setting)
    kept += attention_per_token(model, setting, model.key_value_heads, masked=False)
    if model.staggered and section > 0:
        window = model.cross_attention_window
        masked = window is not None and window < setting.length
        kept += norm_per_token(model, setting)
        kept += attention_per_token(model, setting, model.cross_key_value_heads, masked)
    return kept


def section_per_token(model: ModelConfig, setting: ActivationSetting, section: int) -> int:
    """Everything that one section saves for its backward pass: layers, tokens and, if present, its shifted memory."""
    width, element = model.hidden_size, setting.element
    layer = width * element if setting.checkpoint_layers else layer_per_token(model, setting, section)
    kept = model.section_layers[section] * layer
    if model.staggered or section == 0:
        kept += INDEX
    if model.staggered and section > 0:
        kept += norm_per_token(model, setting)  # its output is replaced by the shifted copy of equal size
    if model.combine_sections:
        kept += width * element  # the output, kept for the gradient of its weight in the mix
    return kept


def layer_backward_per_token(model: ModelConfig, layout: StageLayout, setting: ActivationSetting) -> int:
    """Gradients inside one layer and, with layer checkpointing, the recomputed layer."""
    gradients = (2 * model.intermediate_size // setting.tensor + 3 * model.hidden_size) * setting.element
    if not setting.checkpoint_layers:
        return gradients
    return gradients + max(layer_per_token(model, setting, section) for section in layout.sections)


def head_per_token(model: ModelConfig, setting: ActivationSetting) -> int:
    """Final norm, fp32 softmax (fp32 logits are overwritten by it), mask and index of the label."""
    softmax = FP32 * _vocabulary(model, setting) if setting.element < FP32 else 0
    return norm_per_token(model, setting) + softmax + 2 * INDEX + 1


def logits_per_token(model: ModelConfig, setting: ActivationSetting) -> int:
    """The head's output in the precision of the activations."""
    return _vocabulary(model, setting) * setting.element


def pipe_buffers_per_token(model: ModelConfig, layout: StageLayout, setting: ActivationSetting) -> int:
    """What the pipeline engine holds for one micro-batch in flight: its input, and its output until it is sent."""
    carry = _carry_per_token(model, setting)
    return (carry if layout.sections.start > 0 else INDEX) + (INDEX if layout.head else carry)


def _carry_per_token(model: ModelConfig, setting: ActivationSetting) -> int:
    """What one stage sends to the next: hidden states, the accumulator with combined sections, and the tokens."""
    tensors = 2 if model.combine_sections else 1
    return tensors * model.hidden_size * setting.element + (INDEX if model.staggered else 0)


def _vocabulary(model: ModelConfig, setting: ActivationSetting) -> int:
    """Entries of the vocabulary on one rank."""
    return padded_vocab_size(model.vocab_size, setting.tensor) // setting.tensor


def _vocabulary_matrix(model: ModelConfig, setting: ActivationSetting) -> int:
    """Bytes of a gradient of embedding or head before it is added to the earlier ones."""
    return _vocabulary(model, setting) * model.hidden_size * setting.element


def _embedding_uses(model: ModelConfig, layout: StageLayout) -> int:
    """Number of uses of the embedding's matrix in one pass over a stage."""
    lookups = len(layout.sections) if model.staggered else int(layout.sections.start == 0)
    return lookups + int(layout.tied_head)
