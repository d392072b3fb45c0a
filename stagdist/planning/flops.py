"""Floating-point operations of training, computed from the shape of the model. Pure integers, no torch.

Model FLOPs: a multiply and an add count as two. A backward pass costs twice a forward pass. Recomputation under
activation checkpointing, norms, rotary embeddings and the softmax are not counted, as is usual for MFU. Attention is
counted exactly: only pairs of positions that the mask allows.
"""

from dataclasses import dataclass

from stagdist.config.parts import ModelConfig

FORWARD_AND_BACKWARD = 3
"""A forward pass, and a backward pass that costs twice as much."""


@dataclass(frozen=True)
class SectionFlops:
    """Training FLOPs per token of one section.

    Attributes:
        projections: all products with weights in the layers, including those of cross-attention.
        attention: scores and weighted sums of self-attention.
        cross_attention: scores and weighted sums of cross-attention.
        head: the product with the matrix of the head; 0 except in the last section.
    """

    projections: float
    attention: float
    cross_attention: float
    head: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.projections + self.attention + self.cross_attention + self.head


def attended_pairs(length: int, window: int | None = None) -> int:
    """Pairs (query, key) of a causal mask over `length` positions; a query attends to at most `window` keys."""
    full = length if window is None else min(window, length)
    return full * (full + 1) // 2 + (length - full) * full


def section_flops(model: ModelConfig, sequence_length: int) -> list[SectionFlops]:
    """Training FLOPs per token of every section, first to last, averaged over a sequence."""
    return [_one_section(model, sequence_length, section) for section in range(model.num_sections)]


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs per token of the complete model, averaged over a sequence."""
    return sum(section.total for section in section_flops(model, sequence_length))


def _one_section(model: ModelConfig, length: int, section: int) -> SectionFlops:
    layers = model.section_layers[section]
    has_cross = model.staggered and section > 0
    weights = _attention_weights(model, model.key_value_heads) + 3 * model.hidden_size * model.intermediate_size
    cross_pairs = 0
    if has_cross:
        weights += _attention_weights(model, model.cross_key_value_heads)
        cross_pairs = attended_pairs(length, model.cross_attention_window)
    head = model.hidden_size * model.vocab_size if section == model.num_sections - 1 else 0
    return SectionFlops(
        projections=float(FORWARD_AND_BACKWARD * 2 * layers * weights),
        attention=FORWARD_AND_BACKWARD * layers * _pair_flops(model) * attended_pairs(length) / length,
        cross_attention=FORWARD_AND_BACKWARD * layers * _pair_flops(model) * cross_pairs / length,
        head=float(FORWARD_AND_BACKWARD * 2 * head),
    )


def _attention_weights(model: ModelConfig, key_value_heads: int) -> int:
    """Values in the four projections of an attention."""
    query, key_value = model.num_attention_heads * model.head_width, key_value_heads * model.head_width
    return 2 * model.hidden_size * (query + key_value)


def _pair_flops(model: ModelConfig) -> int:
    """Forward FLOPs of one pair (query, key) over all heads: the score, and its part of the weighted sum."""
    return 4 * model.num_attention_heads * model.head_width
