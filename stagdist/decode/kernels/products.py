"""Products of a few rows with a weight, fused with what surrounds them: RMSNorm before, SwiGLU or the residual after.

A weight is read once for all rows. Sums are in fp32, of fp64 tensors in fp64. The values of an int8 weight are
converted where they are read, and the sums are scaled.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stagdist.decode.layers.matrix import Int8Matrix, Matrix

FEW_ROWS = 8
"""Most rows of a product. With more, a matrix product on tensor cores is faster."""
ENOUGH_PROGRAMS = 512
"""About four for each multiprocessor of a large GPU: with fewer, too few bytes are on their way."""
WARP = 32
LOAD_BYTES = 16
"""Bytes that one thread loads at a time, at most."""


@dataclass(frozen=True)
class Tile:
    """Part of a weight that a program reads at a time.

    Attributes:
        block_n: rows of the weight, a power of two.
        lanes: loads next to each other in each of these rows, a power of two.
        num_warps: warps of a program.
        unroll: iterations over the weight's columns that are written out, so that their loads are under way together.
    """

    block_n: int
    lanes: int
    num_warps: int
    unroll: int


def vector_size(rows: int, element_bytes: int) -> int:
    """Return how many values of a weight one thread loads at a time. With many rows, 16 need too many registers."""
    return LOAD_BYTES // max(element_bytes, 1 if rows <= FEW_ROWS // 2 else 2)


def choose_tile(rows: int, columns: int, width: int, element_bytes: int, *, gated: bool = False) -> Tile:
    """Return the tile for `rows` rows and a weight [columns, width], or two of them if `gated`."""
    loads = -(-width // vector_size(rows, element_bytes))  # of one row of the weight
    num_warps = next((warps for warps in (4, 2) if loads % (warps * WARP) == 0), 4)
    block_n = 16 // num_warps if rows <= FEW_ROWS // 2 else 8 // num_warps  # more rows need more registers
    block_n //= 1 + gated
    while block_n > 1 and columns >= ENOUGH_PROGRAMS > columns // block_n:
        block_n //= 2
    lanes = min(WARP * num_warps, triton.next_power_of_2(loads))
    trips = -(-loads // lanes)
    unroll = next(factor for factor in (4, 3, 2, 1) if trips % factor == 0)
    return Tile(block_n * (WARP * num_warps // lanes), lanes, num_warps, unroll)


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which kernels add values of a type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _scaled(y, scales, n, mask):
    """Multiply by the scales of the rows of an int8 weight; without scales, return `y`."""
    if scales is not None:
        y *= tl.load(scales + n, mask=mask, other=0.0).to(y.dtype)
    return y


@triton.jit
def _epilogue(y, residual, out, mask, m, n, residual_row, out_row):
    """Add the residual, if there is one, and store."""
    if residual is not None:
        y += tl.load(residual + m * residual_row + n, mask=mask, other=0.0).to(y.dtype)
    tl.store(out + m * out_row + n, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product_kernel(
    x, weight, scales, gain, null, null_rows, residual, out,
    rows, columns, width, x_row, weight_row, weight_column, residual_row, out_row,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    UNROLL: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: all rows times `BLOCK_N` rows of the weight.

    `gain` is the weight of an RMSNorm of `x`, whose factor is applied to the sums; where `null_rows`, the vector `null`
    takes the place of the normalized row. All of them, `residual`, and the `scales` of the weight may be None.
    """
    first = tl.program_id(0) * BLOCK_N
    m = tl.arange(0, ROWS)[:, None, None, None]
    n = (first + tl.arange(0, BLOCK_N))[None, :, None, None]
    lanes = tl.arange(0, LANES)[None, None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, None, :]
    sums = tl.zeros([ROWS, BLOCK_N, LANES], ACC)
    up_sums = tl.zeros([ROWS, BLOCK_N, LANES], ACC)
    squares = tl.zeros([ROWS, 1, LANES], ACC)
    for start in tl.range(0, width, LANES * VECTOR, loop_unroll_factor=UNROLL):
        k = start + lanes
        place = n.to(tl.int64) * weight_row + k * weight_column
        mask = (n < columns) & (k < width)
        w = tl.load(weight + place, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        v = tl.load(x + m * x_row + k, mask=(m < rows) & (k < width), other=0.0).to(ACC)
        if gain is not None:
            squares += tl.sum(v * v, 3)
            v *= tl.load(gain + k, mask=k < width, other=0.0).to(ACC)
        if null_rows is not None:
            is_null = tl.load(null_rows + m, mask=m < rows, other=0) != 0
            v = tl.where(is_null, tl.load(null + k, mask=k < width, other=0.0).to(ACC), v)
        sums += tl.sum(w * v, 3)
        if GATED:
            up = weight + tl.cast(columns, tl.int64) * weight_row + place
            up_sums += tl.sum(tl.load(up, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC) * v, 3)
    m, n = tl.arange(0, ROWS)[:, None], (first + tl.arange(0, BLOCK_N))[None, :]
    factor = tl.full([ROWS, 1], 1.0, ACC)
    if gain is not None:
        factor = tl.rsqrt(tl.sum(squares, 2) / width + EPS)
    if null_rows is not None:
        factor = tl.where(tl.load(null_rows + m, mask=m < rows, other=0) != 0, 1.0, factor)
    y = _scaled(tl.sum(sums, 2) * factor, scales, n, n < columns)
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * _scaled(tl.sum(up_sums, 2) * factor, scales, columns + n, n < columns)
    _epilogue(y, residual, out, (m < rows) & (n < columns), m, n, residual_row, out_row)


def _product(
    x: Tensor,
    weight: Matrix,
    out: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    null: Tensor | None = None,
    null_rows: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel. Shapes: x [M, K], weight [N, K], or [2 N, K] if `gated`, out and residual [M, N]."""
    (rows, width), columns = x.shape, out.shape[1]
    assert rows <= FEW_ROWS and x.stride(1) == out.stride(1) == 1 and weight.shape[1] == width
    values, scales = (weight.values, weight.scales) if isinstance(weight, Int8Matrix) else (weight, None)
    tile = tile or choose_tile(rows, columns, width, values.element_size(), gated=gated)
    vector = vector_size(rows, values.element_size())
    product_kernel[(triton.cdiv(columns, tile.block_n),)](
        x, values, scales, gain, null, null_rows, residual, out,
        rows, columns, width, x.stride(0), *values.stride(), 0 if residual is None else residual.stride(0),
        out.stride(0),
        EPS=eps, ROWS=triton.next_power_of_2(rows), BLOCK_N=tile.block_n, LANES=tile.lanes, VECTOR=vector,
        UNROLL=tile.unroll, GATED=gated, ACC=sum_type(x.dtype), num_warps=tile.num_warps,
    )  # fmt: skip
    return out


def norm_linear(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weight: Matrix,
    *,
    null: Tensor | None = None,
    null_rows: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """RMSNorm and product.

    Shapes: x [M, K] with any stride of rows, M <= FEW_ROWS, gain [K], weight [N, K] -> [M, N].

    Args:
        null: [K], takes the place of the normalized row where `null_rows`, bool [M].
        tile: None: `choose_tile`.
    """
    out = x.new_empty(len(x), len(weight))
    return _product(x, weight, out, gain=gain, eps=eps, null=null, null_rows=null_rows, tile=tile)


def norm_swiglu(x: Tensor, gain: Tensor, eps: float, gate_up: Matrix, *, tile: Tile | None = None) -> Tensor:
    """RMSNorm, product and SwiGLU. Shapes: x [M, K], M <= FEW_ROWS, gate_up [2 I, K] -> [M, I]."""
    out = x.new_empty(len(x), len(gate_up) // 2)
    return _product(x, gate_up, out, gain=gain, eps=eps, gated=True, tile=tile)


def add_linear(
    residual: Tensor | None, x: Tensor, weight: Matrix, out: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """Product and residual: residual + x W^T.

    Shapes: residual and out [M, N] with any stride of rows, x [M, K], M <= FEW_ROWS, weight [N, K] -> [M, N].

    Args:
        residual: None: the product alone.
        out: where the result is stored, which may be `residual`; None: in a new tensor.
    """
    out = x.new_empty(len(x), len(weight)) if out is None else out
    return _product(x, weight, out, residual=residual, tile=tile)


@triton.jit
def swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """One program: a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * width + i, mask=i < width, other=0.0).to(ACC)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=i < width, other=0.0).to(ACC)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + i, y.to(out.dtype.element_ty), mask=i < width)


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU of any number of rows. Shapes: gate_up [M, 2 I], contiguous -> [M, I]."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    swiglu_kernel[(rows, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block, ACC=sum_type(out.dtype))
    return out
