"""Writes the memory's keys and values of all layers of a section to their cache."""

import triton
import triton.language as tl
from torch import Tensor

from stagdist.decode.kernels.products import sum_type
from stagdist.decode.kernels.split_attention import rotated


@triton.jit
def memory_store_kernel(
    states, positions, cos, sin, cache,
    window, states_row, layer_stride, kind_stride, row_stride, head_stride, entry_stride,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: all key heads of one layer of one row."""
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pos = tl.load(positions + row)
    if pos >= 0:
        h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
        mask = (h < HEADS) & (d < WIDTH)
        source = states + row * states_row + layer * (2 * HEADS * WIDTH) + h * WIDTH
        key = rotated(source, cos + pos * WIDTH, sin + pos * WIDTH, d, mask, WIDTH, ACC)
        value = tl.load(source + HEADS * WIDTH + d, mask=mask, other=0.0)
        target = cache + layer * layer_stride + row * row_stride + (pos % window) * entry_stride + d
        target += h.to(tl.int64) * head_stride
        tl.store(target, key.to(cache.dtype.element_ty), mask=mask)
        tl.store(target + kind_stride, value, mask=mask)


def store_memory(states: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor) -> None:
    """Rotate the keys and write keys and values to entry `position % W` of the rows that have a request.

    Shapes: states [B, L 2 C D], positions int64 [B], angles: cosines and sines [positions, D] as in `Angles`, cache
    [L, 2, B or more, C, W + 1, D] with any strides but the last.
    """
    layers, _, _, heads, entries, width = cache.shape
    assert states.stride(1) == cache.stride(5) == 1 and positions.is_contiguous()
    memory_store_kernel[(len(states), layers)](
        states, positions, *angles, cache,
        entries - 1, states.stride(0), *cache.stride()[:5],
        HEADS=heads, BLOCK_H=triton.next_power_of_2(heads), WIDTH=width, BLOCK_D=triton.next_power_of_2(width),
        ACC=sum_type(states.dtype),
    )  # fmt: skip
