"""Grouped-query attention with rotary embeddings, for self-attention and cross-attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagdist.config.parts import ModelConfig
from stagdist.model.megatron import ColumnParallel, RowParallel, TensorParallel
from stagdist.model.rotary import rotate


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Causal mask of a sliding window, True where a query may attend; None if the mask is plain causal.

    Query i sees slots i - window + 1 to i. Shapes: bool [S, S].
    """
    if window is None or window >= length:
        return None
    offsets = torch.arange(length, device=device)
    distance = offsets[:, None] - offsets[None, :]
    return (distance >= 0) & (distance < window)


class Attention(nn.Module):
    """Causal attention of a sequence to itself or to another of the same length.

    The heads are split over the tensor ranks. Inputs must have passed `enter_tensor_parallel`.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel, *, key_value_heads: int):
        super().__init__()
        self.head_dim = model.head_width
        self.num_heads = model.num_attention_heads // parallel.size
        self.num_key_value_heads = key_value_heads // parallel.size
        query_width, key_width = model.num_attention_heads * self.head_dim, key_value_heads * self.head_dim
        self.q_proj = ColumnParallel(model.hidden_size, query_width, parallel)
        self.k_proj = ColumnParallel(model.hidden_size, key_width, parallel)
        self.v_proj = ColumnParallel(model.hidden_size, key_width, parallel)
        self.o_proj = RowParallel(query_width, model.hidden_size, parallel)

    def forward(
        self, hidden_states: Tensor, source: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Queries from `hidden_states`, keys and values from `source`, both [B, S, H] -> [B, S, H]."""
        query = rotate(self._heads(self.q_proj(hidden_states), self.num_heads), *rotary)
        key = rotate(self._heads(self.k_proj(source), self.num_key_value_heads), *rotary)
        value = self._heads(self.v_proj(source), self.num_key_value_heads)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_heads != self.num_key_value_heads,
        )
        return self.o_proj(output.transpose(1, 2).flatten(2))  # [B, N, S, D] -> [B, S, N * D]

    def _heads(self, states: Tensor, num_heads: int) -> Tensor:
        return states.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)  # [B, N, S, D]
