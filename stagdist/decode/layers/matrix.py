"""Matrices of weights, in the precision of the computation or in int8, and their products."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
"""Largest magnitude of a value; -128 is not used."""

_CPU_PIECE_BYTES, _GPU_PIECE_BYTES = 1 << 21, 1 << 26
"""Converted values that exist at a time: on a CPU they stay in its caches."""
_FEW_ROWS = 8
_PACKED_WIDTH = 32  # torch's packed product reads beyond the rows of other widths


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """A weight [N, K] in int8, symmetric per output channel: row n is `values[n] * scales[n]`.

    Shapes: values int8 [N, K], contiguous; scales [N], fp32, or fp64 where the computation is in fp64.
    """

    values: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return self.values.nbytes + self.scales.nbytes


Matrix = Tensor | Int8Matrix


def parts_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """The tensors that hold a matrix."""
    return (matrix.values, matrix.scales) if isinstance(matrix, Int8Matrix) else (matrix,)


def quantize(weight: Tensor) -> Int8Matrix:
    """Quantize each row symmetrically to -127..127; ties round to even. 127 stands for the row's largest magnitude.

    Computed in fp32 for every dtype, so a model has the same int8 weights in every precision.

    Shapes: [N, K] -> values [N, K], scales fp32 [N]; the scale of a row of zeros is 1, that of a row with NaN is NaN.
    """
    weight = weight.float()
    scales = weight.abs().amax(1) / LARGEST
    scales = scales.masked_fill(scales == 0, 1.0)
    values = (weight / scales[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return Int8Matrix(values.to(torch.int8), scales)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """`F.linear` without bias. Shapes: x [..., K], matrix [N, K] -> [..., N].

    The values of an int8 matrix are converted to the dtype of `x`, which is exact, and the sums are scaled. Many rows
    in bf16 are computed in fp32 on a CPU without instructions for bf16: torch's own product takes five times as long.
    """
    many = x.numel() > _FEW_ROWS * x.shape[-1]
    if many and x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _computes_bf16():
        return _product(x.float(), matrix).to(x.dtype)
    return _product(x, matrix)


def _product(x: Tensor, matrix: Matrix) -> Tensor:
    if isinstance(matrix, Int8Matrix):
        return _sums(x, matrix.values).mul_(matrix.scales)
    return F.linear(x, matrix) if matrix.dtype == x.dtype else _sums(x, matrix)


@functools.cache
def _computes_bf16() -> bool:
    """Whether torch has fast products in bf16 on this processor."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def _sums(x: Tensor, values: Tensor) -> Tensor:
    """Product with the values, not scaled yet. Shapes: x [..., K], values [N, K] -> [..., N]."""
    width = values.shape[1]
    few = x.numel() <= _FEW_ROWS * width
    if few and x.device.type == "cpu" and x.dtype == torch.bfloat16 and width % _PACKED_WIDTH == 0:
        # torch's fp32 version is not vectorized and ten times slower than converting first.
        ones = x.new_ones(len(values))
        return torch._weight_int8pack_mm(x.reshape(-1, width), values, ones).view(*x.shape[:-1], -1)
    piece_bytes = _CPU_PIECE_BYTES if x.device.type == "cpu" else _GPU_PIECE_BYTES
    rows = max(1, piece_bytes // (width * x.element_size()))
    parts = [F.linear(x, piece.to(x.dtype)) for piece in values.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
