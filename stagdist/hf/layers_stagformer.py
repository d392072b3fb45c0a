"""Layers and sections of a StagFormer, and the cache of their keys, values and memories.

This file is copied into every exported model directory. Source: Cutler et al., "StagFormer", COLM 2025, arXiv
2501.15665.

Shapes: `B` batch, `S` new positions, `T` all positions so far, `H` hidden, `N` heads, `K` key/value heads,
`D` head dim, `V` vocabulary, `p` sections.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_stagformer import StagFormerConfig


class StagFormerCache(DynamicCache):
    """Keys and values of all layers, and the outputs from which the next memories are built.

    Layers 0 to L-1 hold self-attention, L to 2L-1 cross-attention, L being the layers of all sections together.

    Attributes:
        pending: by section, the normalized outputs of the previous section that are not in its memory yet,
            [B, stagger, H].
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[int, Tensor] = {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows after a step of beam search."""
        super().reorder_cache(beam_idx)
        self.pending = {s: state.index_select(0, beam_idx.to(state.device)) for s, state in self.pending.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.pending = {s: state.repeat_interleave(repeats, dim=0) for s, state in self.pending.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        super().batch_select_indices(indices)
        self.pending = {s: state[indices] for s, state in self.pending.items()}

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.pending = {}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: the outputs that a shorter text needs are no longer stored."""
        raise NotImplementedError("the cache of a StagFormer cannot be shortened; run the model on the text again")


def rotary_tables(config: StagFormerConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, computed in fp32. Shapes: int64 [B, S] -> [B, 1, S, D] each.

    Source: RoFormer (Su et al. 2021); for `llama3` the rule published with Llama 3.1, which keeps short wavelengths,
    stretches long ones and blends between.
    """
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        kept = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = (1 - kept) * frequencies / rope["factor"] + kept * frequencies
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of every head by the angles of its position. Shape: [B, N, S, D]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def visible_keys(
    texts: Tensor | None, past: int, length: int, window: int | None, device: torch.device
) -> Tensor | None:
    """The positions that each new position attends to; None for plain causal attention.

    Shapes: texts, equal numbers for positions that may see each other, [B, T] or None -> bool [B or 1, 1, S, T].
    """
    total = past + length
    windowed = window is not None and window < total
    if texts is None and not windowed and (past == 0 or length == 1):
        return None
    keys = torch.arange(total, device=device)
    distance = keys[past:, None] - keys[None, :]  # [S, T]
    visible = (distance >= 0)[None, None]
    if window is not None:
        visible = visible & (distance < window)
    if texts is not None:
        # Padding attends to padding: a softmax over no positions would be NaN and would spread.
        visible = visible & (texts[:, None, past:, None] == texts[:, None, None, :])
    return visible


class ResidualProjection(nn.Linear):
    """A projection whose result is added to the residual stream; its initial weights are smaller."""


class StagFormerAttention(nn.Module):
    """Grouped-query attention with rotary embeddings, to the sequence itself or to a memory."""

    def __init__(self, config: StagFormerConfig, key_value_heads: int):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = ResidualProjection(queries, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        source: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache_layer: int,
        cache: StagFormerCache | None,
    ) -> Tensor:
        """Attend. Queries from `hidden_states`, new keys and values from `source`, both [B, S, H] -> [B, S, H]."""
        query = rotate(self._heads(self.q_proj(hidden_states)), *rotary)
        key = rotate(self._heads(self.k_proj(source)), *rotary)
        value = self._heads(self.v_proj(source))
        if cache is not None:
            key, value = cache.update(key, value, cache_layer)
        causal, grouped = visible is None and query.shape[2] > 1, key.shape[1] != query.shape[1]
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=causal, enable_gqa=grouped
        )
        return self.o_proj(output.transpose(1, 2).flatten(2))  # [B, N, S, D] -> [B, S, N * D]

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, N, S, D]


class StagFormerMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: StagFormerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shapes: [B, S, H] -> [B, S, H]."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def rms_norm(config: StagFormerConfig) -> nn.RMSNorm:
    """The norm of the model."""
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class StagFormerLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention if there is a memory, and MLP.

    Arguments of `forward` are tensors, tuples of tensors, numbers and the cache, because hooks that place layers on
    several devices move the arguments. A call uses parameters of this layer only.

    Args:
        has_core: False if the layer uses self-attention and MLP of section 0.
        has_cross: True in all sections except the first.
    """

    def __init__(self, config: StagFormerConfig, has_core: bool, has_cross: bool):
        super().__init__()
        self.has_core, self.num_layers = has_core, config.num_hidden_layers
        if has_core:
            self.self_attention_norm = rms_norm(config)
            self.self_attention = StagFormerAttention(config, config.num_key_value_heads)
            self.mlp_norm = rms_norm(config)
            self.mlp = StagFormerMLP(config)
        if has_cross:
            self.cross_attention_norm = rms_norm(config)
            self.cross_attention = StagFormerAttention(config, config.cross_attention_key_value_heads)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        visible_memory: Tensor | None,
        cache_layer: int,
        attend: bool = True,
        feed: bool = True,
        cache: StagFormerCache | None = None,
    ) -> Tensor:
        """Run what the layer has. Shapes: hidden_states and memory [B, S, H] -> [B, S, H].

        A layer of section 0 that other sections share leaves out self-attention without `attend`, its MLP without
        `feed`: the cross-attention of the other layer comes between the two.
        """
        if self.has_core and attend:
            x = self.self_attention_norm(hidden_states)
            hidden_states = hidden_states + self.self_attention(x, x, rotary, visible, cache_layer, cache=cache)
        if memory is not None:
            normed = self.cross_attention_norm(hidden_states)
            memory = memory.view_as(memory)  # gradients add up layer by layer, checkpointed or not
            cache_layer += self.num_layers
            attended = self.cross_attention(normed, memory, rotary, visible_memory, cache_layer, cache=cache)
            hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states)) if self.has_core and feed else hidden_states


class StagFormerSection(nn.Module):
    """Consecutive layers with one residual stream, and the memory of the previous section that they read."""

    def __init__(self, config: StagFormerConfig, index: int):
        super().__init__()
        self.index, self.stagger = index, config.stagger
        self.first_cache_layer = sum(config.section_layers[:index])
        has_core = index == 0 or not config.share_section_weights
        self.layers = nn.ModuleList(
            StagFormerLayer(config, has_core, has_cross=index > 0) for _ in range(config.section_layers[index])
        )
        if index > 0:
            self.memory_norm = rms_norm(config)
            if config.stagger > 0:
                self.null_memory = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, previous: Tensor, in_gap: Tensor, cache: StagFormerCache | None = None) -> Tensor:
        """Output of the previous section, normalized and delayed by `stagger`; a learned vector fills the gap.

        The model runs the layers. Shapes: previous [B, S, H], in_gap [B or 1, S] -> [B, S, H].
        """
        normed = self.memory_norm(previous)
        if self.stagger == 0:
            return normed
        earlier = None if cache is None else cache.pending.get(self.index)
        if earlier is None:
            earlier = normed.new_zeros(normed.shape[0], self.stagger, normed.shape[2])  # all of it is in the gap
        outputs = torch.cat((earlier, normed), dim=1)
        if cache is not None:
            cache.pending[self.index] = outputs[:, -self.stagger :].clone()  # a view would keep all
        # The layers of a section may lie on several devices, and its parameter on another than its norm.
        null_memory, in_gap = self.null_memory.to(normed.device), in_gap.to(normed.device)
        return torch.where(in_gap[..., None], null_memory, outputs[:, : normed.shape[1]])


class ForwardContext:
    """Values that all sections share in one forward pass.

    Attributes:
        rotary: cosines and sines of the new positions.
        visible, visible_memory: masks of self- and cross-attention.
        in_gap: new positions among the first `stagger` real ones of their text, [B or 1, S].
        cache: cache of earlier calls; None if nothing is stored.

    Raises:
        ValueError: the attention mask has the wrong shape, or padding between real tokens; there are several texts in
            a row and a cache.
    """

    def __init__(
        self,
        config: StagFormerConfig,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: StagFormerCache | None,
    ):
        self.cache = cache
        device, length = embeddings.device, embeddings.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        position_ids = None if position_ids is None else position_ids.to(device)
        order, texts = torch.arange(past, past + length, device=device)[None], None
        if attention_mask is not None:
            texts = _checked_mask(attention_mask.to(device), past + length)
            order = order if texts is None else texts.cumsum(-1)[:, past:] - 1
        elif position_ids is not None:
            begins = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
            texts = _packed_texts(begins, cache)
            order = order if texts is None else order - torch.where(begins, order, 0).cummax(-1).values
        self.in_gap = order < config.stagger
        self.rotary = rotary_tables(
            config, order.clamp(min=0) if position_ids is None else position_ids, embeddings.dtype
        )
        self.visible = visible_keys(texts, past, length, None, device)
        window = config.cross_attention_window
        self.visible_memory = self.visible if window is None else visible_keys(texts, past, length, window, device)


def _packed_texts(begins: Tensor, cache: StagFormerCache | None) -> Tensor | None:
    """Numbers of the texts that are packed into each row; None if every row is one text. Shape: [B, S]."""
    message = "position_ids begin again, which packs several texts into a row; that needs use_cache=False"
    if torch.compiler.is_compiling():  # values are not known yet
        if cache is not None:
            torch._assert_async(~begins.any(), message)
    elif not bool(begins.any()):
        return None
    elif cache is not None:
        raise ValueError(message)
    return begins.cumsum(-1) if cache is None else None


def _checked_mask(attention_mask: Tensor, total: int) -> Tensor | None:
    """The mask as 0 and 1; None without padding. Shape: [B, T]."""
    if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}; it must cover all positions so far, [batch, {total}]")
    real = attention_mask.bool()
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    begins = F.pad(real, (1, 0))[:, :-1] < real
    message = "padding between real tokens would count as positions of the memory; pad on the left"
    if torch.compiler.is_compiling():  # values are not known yet
        torch._assert_async((begins.sum(-1) <= 1).all(), message)
    elif bool((begins.sum(-1) > 1).any()):
        raise ValueError(message)
    return real.long()
