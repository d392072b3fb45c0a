"""Rotary position embeddings: Llama's, with Llama 3's scaling."""

import math

import torch
from torch import Tensor, nn

from stagdist.config.parts import ModelConfig, RopeScaling


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Angle per position of each pair, fp32 [D / 2].

    Source: RoPE (Su et al. 2021); for `rope_scaling` the rule published with Llama 3.1.
    """
    exponents = torch.arange(0, model.head_width, 2, dtype=torch.float32) / model.head_width
    frequencies = 1.0 / (model.rope_theta**exponents)
    return frequencies if model.rope_scaling is None else _stretch(frequencies, model.rope_scaling)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, interpolate between."""
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    blend = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


class Rotary(nn.Module):
    """Table of cosines and sines for all positions; not part of a checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: ModelConfig):
        super().__init__()
        positions = torch.arange(model.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(model))
        angles = torch.cat((angles, angles), dim=-1)  # [max positions, D]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to `length` - 1, each [S, D], computed in fp32 and returned in `dtype`."""
        return self.cos[:length].to(dtype), self.sin[:length].to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head by its position's angles.

    Shapes: states [B, N, S, D], cos and sin [S, D] -> [B, N, S, D].
    """
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
