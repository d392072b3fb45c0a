"""Tensor-parallel layers, derived from those of megatron-core.

Weights are sharded over the tensor axis only. Inputs and outputs are `[B, S, H]`. Weights are initialized in
`stagdist/model/initialization.py`, so that their values do not depend on the grid.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def _without_compiler_and_wandb() -> Iterator[None]:
    """Importing megatron-core would import torch's compiler and wandb, for functions that are not used here.

    They take almost three of the seven seconds of processor time with which a rank starts.
    """
    compiler, wandb = torch.compile, sys.modules.get("wandb")
    torch.compile = lambda function: function  # type: ignore[assignment]
    sys.modules["wandb"] = wandb  # type: ignore[assignment]  # None: to import it fails
    try:
        yield
    finally:
        torch.compile = compiler
        if wandb is None:
            del sys.modules["wandb"]


with _without_compiler_and_wandb(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional GPU packages
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
    )


@dataclass(frozen=True)
class TensorParallel:
    """The tensor axis as a layer sees it.

    Attributes:
        group: process group of the ranks that split the same matrices.
        dtype: of new parameters.
    """

    group: dist.ProcessGroup
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return self.group.rank()

    def layer_config(self) -> ModelParallelConfig:
        """The configuration of megatron-core's layers.

        CPU initialization needs no CUDA device; the engine moves the weights afterwards.
        """
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            params_dtype=self.dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            # The embedding then avoids the backward pass of `torch.nn.functional.embedding`.
            deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        )


def _no_initialization(weight: Tensor) -> None:
    raise AssertionError("weights are initialized by name, not by the layer")


class ColumnParallel(ColumnParallelLinear):
    """`y = x W^T`, W split by rows. Expects its input to have passed `enter_tensor_parallel`.

    Shapes: [B, S, H] -> [B, S, output / tensor size].
    """

    def __init__(self, input_size: int, output_size: int, parallel: TensorParallel, *, own_weight: bool = True):
        super().__init__(
            input_size,
            output_size,
            config=parallel.layer_config(),
            init_method=_no_initialization,
            bias=False,
            skip_weight_param_allocation=not own_weight,
            # Several projections read one input; `enter_tensor_parallel` reduces its gradient once.
            disable_grad_reduce=True,
            tp_group=parallel.group,
        )
        if own_weight:
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, hidden_states: Tensor, weight: Tensor | None = None) -> Tensor:
        """Apply to `hidden_states`, with a tied `weight` if the layer has none."""
        output, _ = super().forward(hidden_states, weight=weight)
        return output


class RowParallel(RowParallelLinear):
    """`y = x W^T`, W split by columns; the partial results are summed over the tensor ranks.

    Shapes: [B, S, input / tensor size] -> [B, S, H].
    """

    def __init__(self, input_size: int, output_size: int, parallel: TensorParallel):
        super().__init__(
            input_size,
            output_size,
            config=parallel.layer_config(),
            init_method=_no_initialization,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=parallel.group,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply and sum over the tensor ranks."""
        output, _ = super().forward(hidden_states)
        return output


class TokenEmbedding(VocabParallelEmbedding):
    """Embedding table split over the vocabulary.

    Shapes: int64 [B, S] -> [B, S, H].
    """

    def __init__(self, padded_vocab_size: int, hidden_size: int, parallel: TensorParallel):
        super().__init__(
            padded_vocab_size,
            hidden_size,
            init_method=_no_initialization,
            config=parallel.layer_config(),
            tp_group=parallel.group,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: megatron-core's reduction loses the sum of a gradient that is not."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden_states: Tensor) -> Tensor:
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


def enter_tensor_parallel(hidden_states: Tensor, parallel: TensorParallel) -> Tensor:
    """Mark where a replicated tensor enters split projections: its gradient is summed over the tensor ranks."""
    if parallel.size == 1:
        return hidden_states
    return _ContiguousGradient.apply(copy_to_tensor_model_parallel_region(hidden_states, group=parallel.group))
