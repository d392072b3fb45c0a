"""One layer of a section: self-attention, cross-attention to the memory where there is one, SwiGLU.

A layer has two parts: with shared weights, all sections share the first and each section has its own second.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from stagdist.config.parts import ModelConfig
from stagdist.model.attention import Attention
from stagdist.model.megatron import ColumnParallel, RowParallel, TensorParallel, enter_tensor_parallel


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`. Shapes: [B, S, H] -> [B, S, H]."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.gate_proj = ColumnParallel(model.hidden_size, model.intermediate_size, parallel)
        self.up_proj = ColumnParallel(model.hidden_size, model.intermediate_size, parallel)
        self.down_proj = RowParallel(model.intermediate_size, model.hidden_size, parallel)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply to the normalized residual stream."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def rms_norm(model: ModelConfig, parallel: TensorParallel) -> nn.RMSNorm:
    """RMSNorm over the hidden size, its gain replicated over the tensor ranks."""
    return nn.RMSNorm(model.hidden_size, eps=model.rms_norm_eps, dtype=parallel.dtype)


class LayerCore(nn.Module):
    """The part that every layer has: self-attention and SwiGLU with their norms."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.self_attention_norm = rms_norm(model, parallel)
        self.self_attention = Attention(model, parallel, key_value_heads=model.key_value_heads)
        self.mlp_norm = rms_norm(model, parallel)
        self.mlp = SwiGLU(model, parallel)


class LayerCross(nn.Module):
    """The part that only layers of later sections have: cross-attention with its norm."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.cross_attention_norm = rms_norm(model, parallel)
        self.cross_attention = Attention(model, parallel, key_value_heads=model.cross_key_value_heads)


def run_layer(
    core: LayerCore,
    cross: LayerCross | None,
    parallel: TensorParallel,
    hidden_states: Tensor,
    memory: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    memory_mask: Tensor | None,
) -> Tensor:
    """Run one layer over a full sequence.

    Shapes: hidden_states and memory [B, S, H] -> [B, S, H]. `memory` is already shifted and has passed
    `enter_tensor_parallel`; `memory_mask` is None for plain causal cross-attention.
    """
    normed = enter_tensor_parallel(core.self_attention_norm(hidden_states), parallel)
    hidden_states = hidden_states + core.self_attention(normed, normed, rotary, None)
    if cross is not None:
        assert memory is not None, "a layer with cross-attention was run without memory"
        normed = enter_tensor_parallel(cross.cross_attention_norm(hidden_states), parallel)
        hidden_states = hidden_states + cross.cross_attention(normed, memory, rotary, memory_mask)
    normed = enter_tensor_parallel(core.mlp_norm(hidden_states), parallel)
    return hidden_states + core.mlp(normed)
