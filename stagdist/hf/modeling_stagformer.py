"""StagFormer for `transformers`: a decoder in sections that look at each other's earlier outputs.

Self-contained: this file and `configuration_stagformer.py` travel with every exported model and need torch and
transformers only. Source: Cutler et al., "StagFormer", COLM 2025, arXiv 2501.15665.

Shapes: `B` batch, `S` new positions, `T` all positions up to now, `H` hidden, `N` heads, `K` key/value heads,
`D` head dim, `V` vocabulary, `p` sections.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_stagformer import StagFormerConfig


class StagFormerCache(DynamicCache):
    """Keys and values of all layers, and what the memories of the next positions are made of.

    Layers 0 to L-1 hold self-attention, L to 2L-1 cross-attention, L being the layers of all sections together.

    Attributes:
        pending: by section, the normalised outputs of the section before it that are not in its memory yet,
            [B, stagger, H].
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[int, Tensor] = {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams that were chosen."""
        super().reorder_cache(beam_idx)
        self.pending = {s: state.index_select(0, beam_idx.to(state.device)) for s, state in self.pending.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.pending = {s: state.repeat_interleave(repeats, dim=0) for s, state in self.pending.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.pending = {s: state[indices] for s, state in self.pending.items()}

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.pending = {}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: outputs that a shorter text would need are gone."""
        raise NotImplementedError("the cache of a StagFormer cannot be shortened; start again from the text")


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
    """Turn the two halves of every head by its position's angles. Shape: [B, N, S, D]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def visible_keys(
    real: Tensor | None, past: int, length: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which of all positions each new one may look at; None where all earlier ones and itself are meant.

    Shapes: real, False for padding, [B, T] or None -> bool [B or 1, 1, S, T].
    """
    total = past + length
    windowed = window is not None and window < total
    if real is None and not windowed and (past == 0 or length == 1):
        return None
    keys = torch.arange(total, device=device)
    distance = keys[past:, None] - keys[None, :]  # [S, T]
    visible = (distance >= 0)[None, None]
    if window is not None:
        visible = visible & (distance < window)
    if real is not None:
        # Padding looks at itself: a softmax over nothing would be NaN and spread from there.
        visible = visible & (real[:, None, None, :] | (distance == 0))
    return visible


class ResidualProjection(nn.Linear):
    """A projection whose result is added to the residual stream; it starts smaller than others."""


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
        cache: StagFormerCache | None,
        cache_layer: int,
    ) -> Tensor:
        """Queries from `hidden_states`, new keys and values from `source`, both [B, S, H] -> [B, S, H]."""
        query = rotate(self._heads(self.q_proj(hidden_states)), *rotary)
        key = rotate(self._heads(self.k_proj(source)), *rotary)
        value = self._heads(self.v_proj(source))
        if cache is not None:
            key, value = cache.update(key, value, cache_layer)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None and query.shape[2] > 1,
            enable_gqa=key.shape[1] != query.shape[1],
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


def _norm(config: StagFormerConfig) -> nn.RMSNorm:
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class StagFormerLayer(nn.Module):
    """Self-attention, cross-attention where there is a memory, MLP.

    Args:
        has_core: False where self-attention and MLP are those of section 0.
        has_cross: True in every section but the first.
    """

    def __init__(self, config: StagFormerConfig, has_core: bool, has_cross: bool):
        super().__init__()
        if has_core:
            self.self_attention_norm = _norm(config)
            self.self_attention = StagFormerAttention(config, config.num_key_value_heads)
            self.mlp_norm = _norm(config)
            self.mlp = StagFormerMLP(config)
        if has_cross:
            self.cross_attention_norm = _norm(config)
            self.cross_attention = StagFormerAttention(config, config.cross_attention_key_value_heads)

    def forward(
        self, hidden_states: Tensor, memory: Tensor | None, core: "StagFormerLayer", call: "Call", cache_layer: int
    ) -> Tensor:
        """Shapes: hidden_states and memory [B, S, H] -> [B, S, H]. `core` has self-attention and MLP: itself, or one
        of section 0."""
        normed = core.self_attention_norm(hidden_states)
        hidden_states = hidden_states + core.self_attention(
            normed, normed, call.rotary, call.visible, call.cache, cache_layer
        )
        if memory is not None:
            hidden_states = hidden_states + self.cross_attention(
                self.cross_attention_norm(hidden_states),
                memory,
                call.rotary,
                call.visible_memory,
                call.cache,
                call.num_layers + cache_layer,
            )
        return hidden_states + core.mlp(core.mlp_norm(hidden_states))


class StagFormerSection(nn.Module):
    """Consecutive layers over one residual stream, with a memory of the section before it."""

    def __init__(self, config: StagFormerConfig, index: int):
        super().__init__()
        self.index, self.stagger = index, config.stagger
        self.first_cache_layer = sum(config.section_layers[:index])
        has_core = index == 0 or not config.share_section_weights
        self.layers = nn.ModuleList(
            StagFormerLayer(config, has_core, has_cross=index > 0) for _ in range(config.section_layers[index])
        )
        if index > 0:
            self.memory_norm = _norm(config)
            if config.stagger > 0:
                self.null_memory = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(
        self, embeddings: Tensor, previous: Tensor | None, call: "Call", shared: "StagFormerSection | None"
    ) -> Tensor:
        """Output of the section, all [B, S, H]; `shared` owns self-attention and MLP where this one does not."""
        memory = None if previous is None else self.memory(previous, call)
        hidden_states = embeddings
        cores = self.layers if shared is None else shared.layers
        for number, (layer, core) in enumerate(zip(self.layers, cores, strict=True)):
            hidden_states = layer(hidden_states, memory, core, call, self.first_cache_layer + number)
        return hidden_states

    def memory(self, previous: Tensor, call: "Call") -> Tensor:
        """The previous section's output, normalised and late by `stagger`; a learned vector fills the gap. [B, S, H]"""
        normed = self.memory_norm(previous)
        if self.stagger == 0:
            return normed
        earlier = None if call.cache is None else call.cache.pending.get(self.index)
        if earlier is None:
            earlier = normed.new_zeros(normed.shape[0], self.stagger, normed.shape[2])  # all of it lies in the gap
        outputs = torch.cat((earlier, normed), dim=1)
        if call.cache is not None:
            call.cache.pending[self.index] = outputs[:, -self.stagger :].clone()  # a view would keep the whole prompt
        return torch.where(call.in_gap[..., None], self.null_memory, outputs[:, : normed.shape[1]])


class Call:
    """What all sections share in one forward call.

    Attributes:
        real: False for padding, [B, T]; None where nothing is padded.
        rotary: cosines and sines of the new positions.
        visible, visible_memory: masks of self- and cross-attention.
        in_gap: new positions that are among the first `stagger` real ones of their row, [B or 1, S].
        cache: of earlier calls; None where nothing is kept.

    Raises:
        ValueError: the attention mask has the wrong shape, or padding between real tokens.
    """

    def __init__(
        self,
        config: StagFormerConfig,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: StagFormerCache | None,
    ):
        self.cache, self.num_layers = cache, config.num_hidden_layers
        device, length = embeddings.device, embeddings.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        self.real = None if attention_mask is None else _checked_mask(attention_mask, past + length)
        if self.real is None:
            order = torch.arange(past, past + length, device=device)[None]
        else:
            order = self.real.long().cumsum(-1)[:, past:] - 1
        self.in_gap = order < config.stagger
        self.rotary = rotary_tables(
            config, order.clamp(min=0) if position_ids is None else position_ids, embeddings.dtype
        )
        self.visible = visible_keys(self.real, past, length, None, device)
        window = config.cross_attention_window
        self.visible_memory = self.visible if window is None else visible_keys(self.real, past, length, window, device)


def _checked_mask(attention_mask: Tensor, total: int) -> Tensor | None:
    """The mask as booleans, None where nothing is padded. Shape: [B, T]."""
    if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}; it must cover all positions up to now, [batch, {total}]")
    real = attention_mask.bool()
    if bool(real.all()):
        return None
    begins = F.pad(real, (1, 0))[:, :-1] < real
    if bool((begins.sum(-1) > 1).any()):
        raise ValueError("padding between real tokens would count as positions of the memory; pad on the left")
    return real


class StagFormerPreTrainedModel(PreTrainedModel):
    """What `transformers` asks of every model."""

    config: StagFormerConfig
    config_class = StagFormerConfig
    _supports_sdpa = True
    _no_split_modules = ["StagFormerSection"]
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        """A new model: normal by hidden size, projections into the residual stream smaller, norms 1, vectors 0."""
        if isinstance(module, nn.Linear | nn.Embedding):
            deviation = self.config.hidden_size**-0.5
            if isinstance(module, ResidualProjection):
                deviation /= math.sqrt(2 * self.config.num_hidden_layers)
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, StagFormerSection) and hasattr(module, "null_memory"):
            nn.init.zeros_(module.null_memory)
        elif isinstance(module, StagFormerForCausalLM) and hasattr(module, "section_mix"):
            nn.init.constant_(module.section_mix, 1 / len(self.config.section_layers))


class StagFormerForCausalLM(StagFormerPreTrainedModel, GenerationMixin):
    """The sections, run one after the other, and the language-model head.

    `generate` works with its cache for greedy search, sampling, beams and left-padded batches. Decoding with all
    sections at the same time, which is what the architecture is for, is what stagdist does; results are equal.
    """

    _tied_weights_keys = {"head.weight": "embedding.weight"}
    _is_stateful = True  # `pending` cannot go back, as assisted decoding would ask

    def __init__(self, config: StagFormerConfig):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.sections = nn.ModuleList(StagFormerSection(config, index) for index in range(len(config.section_layers)))
        self.output_norm = _norm(config)
        self.head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.combine_sections:
            self.section_mix = nn.Parameter(torch.full((len(config.section_layers),), 1 / len(config.section_layers)))
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes the cache: it holds more than keys and values

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StagFormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: new tokens, int64 [B, S].
            attention_mask: 0 for padding, of all positions up to now, [B, T]. Padding stands on the left of a row (or
                on its right, where nothing is generated).
            position_ids: positions for the rotary embedding, int64 [B, S]; by default real tokens counted from 0.
            past_key_values: what the call before returned.
            inputs_embeds: embeddings instead of `input_ids`, [B, S, H].
            labels: int64 [B, S], shifted in here; -100 is left out.
            use_cache: give back `past_key_values`; by default as the configuration says.
            output_hidden_states: also give the embeddings and the output of every section, each [B, S, H].
            return_dict: False for a plain tuple.
            logits_to_keep: logits of this many last positions only (0: all), or of these positions.
            kwargs: `num_items_in_batch` of the Trainer.

        Returns: logits [B, S, V].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.pop("output_attentions", None):
            raise ValueError(
                "the attention weights of a StagFormer are not computed one by one; output_attentions is off"
            )
        if past_key_values is not None and not isinstance(past_key_values, StagFormerCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}; only a StagFormerCache fits")
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = StagFormerCache()
        embeddings = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        call = Call(self.config, embeddings, attention_mask, position_ids, past_key_values)
        outputs = self._section_outputs(embeddings, call)
        hidden_states = outputs[-1]
        if self.config.combine_sections:
            hidden_states = sum(mix * output for mix, output in zip(self.section_mix, outputs, strict=True))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.output_norm(hidden_states[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(embeddings, *outputs) if wanted else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _section_outputs(self, embeddings: Tensor, call: Call) -> list[Tensor]:
        outputs: list[Tensor] = []
        for section in self.sections:
            shared = self.sections[0] if self.config.share_section_weights else None
            outputs.append(section(embeddings, outputs[-1] if outputs else None, call, shared))
        return outputs
