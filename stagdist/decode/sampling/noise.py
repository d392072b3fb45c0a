"""Gumbel noise that belongs to (seed, position, token), so a sample does not depend on batch, slot or grid."""

import torch

# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014): a counter times an odd
# constant, then a finalizer. Written as signed integers, since torch multiplies and wraps int64 only.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_SHIFTS = (30, 27, 31)
_BITS = 52


def uniform(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Numbers in the open interval (0, 1), each a pure function of its seed, position and token id.

    They are odd multiples of 2^-53: 53 random bits could round to 1.

    Shapes: seeds, positions int64 [B]; token_ids int64 [V] or [B, V]; result float64 [B, V].
    """
    rows = _finalize(seeds * _STEP)
    rows = _finalize(rows.add_(positions * _STEP))
    bits = _finalize(rows.unsqueeze(-1) + token_ids * _STEP)
    bits.bitwise_right_shift_(64 - _BITS).bitwise_and_((1 << _BITS) - 1)
    return bits.double().add_(0.5).mul_(2.0**-_BITS)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, each a pure function of its seed, position and token id.

    `argmax(logits + gumbel)` is a sample from `softmax(logits)`. Devices agree up to their logarithm's rounding.

    Shapes: seeds, positions int64 [B]; token_ids int64 [V] or [B, V]; result float64 [B, V].
    """
    return uniform(seeds, positions, token_ids).log_().neg_().log_().neg_()


def _finalize(bits: torch.Tensor) -> torch.Tensor:
    """Mix the bits in place until each depends on all."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        # torch's >> repeats the sign bit; the mask makes it the unsigned shift of the algorithm.
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if multiplier is not None:
            bits.mul_(multiplier)
    return bits
