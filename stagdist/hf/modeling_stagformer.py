"""StagFormer for `transformers`: a decoder in sections that attend to earlier outputs of the previous section.

This file, `layers_stagformer.py` and `configuration_stagformer.py` are copied into every exported model directory and
need only torch and transformers. Source: Cutler et al., "StagFormer", COLM 2025, arXiv 2501.15665.

Shapes: `B` batch, `S` new positions, `T` all positions so far, `H` hidden, `V` vocabulary.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .configuration_stagformer import StagFormerConfig
from .layers_stagformer import ForwardContext, ResidualProjection, StagFormerCache, StagFormerSection, rms_norm

logger = logging.get_logger(__name__)


class StagFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """The sections, run one after the other, and the language-model head.

    `generate` supports greedy search, sampling, beam search and left-padded batches with a cache. stagdist decodes with
    all sections at the same time, which is the purpose of the architecture; the results are equal.
    """

    config: StagFormerConfig
    config_class = StagFormerConfig
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["StagFormerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _tied_weights_keys = {"head.weight": "embedding.weight"}
    gradient_checkpointing = False
    _input_embed_layer = "embedding"
    _is_stateful = True  # `pending` cannot be rolled back, which assisted decoding needs

    def __init__(self, config: StagFormerConfig):
        config.check()
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.sections = nn.ModuleList(StagFormerSection(config, index) for index in range(len(config.section_layers)))
        self.output_norm = rms_norm(config)
        self.head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.combine_sections:
            self.section_mix = nn.Parameter(torch.full((len(config.section_layers),), 1 / len(config.section_layers)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize: normal by hidden size, smaller for projections into the residual stream; norms 1, vectors 0."""
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

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates the cache: it stores more than keys and values

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
        """Compute logits, and the loss if there are labels.

        Args:
            input_ids: new tokens, int64 [B, S].
            attention_mask: 0 for padding, of all positions so far, [B, T]. Padding is on the left of a row (or on its
                right if nothing is generated).
            position_ids: positions for the rotary embedding, int64 [B, S]; by default real tokens counted from 0.
                Without `attention_mask`, a position that does not follow the one before it begins another text.
            past_key_values: the cache that the previous call returned.
            inputs_embeds: embeddings instead of `input_ids`, [B, S, H].
            labels: int64 [B, S], shifted here; -100 is ignored.
            use_cache: return `past_key_values`; None for the value of the configuration.
            output_hidden_states: also return the embeddings and the output of every section, each [B, S, H].
            return_dict: False for a plain tuple.
            logits_to_keep: logits of this many last positions (0: all), or of these positions.
            kwargs: `num_items_in_batch` from the Trainer.

        Returns: logits [B, S, V].
        """
        _check_arguments(input_ids, inputs_embeds, past_key_values, kwargs.pop("output_attentions", None))
        past_key_values = self._usable_cache(past_key_values, self.config.use_cache if use_cache is None else use_cache)
        embeddings = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        context = ForwardContext(self.config, embeddings, attention_mask, position_ids, past_key_values)
        outputs = self._section_outputs(embeddings, context)
        hidden_states = outputs[-1]
        if self.config.combine_sections:
            mixes = self.section_mix.to(hidden_states.device)  # sections may lie on several devices
            parts = zip(mixes, outputs, strict=True)
            hidden_states = sum(mix * output.to(hidden_states.device) for mix, output in parts)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.output_norm(hidden_states[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(embeddings, *outputs) if with_states else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _usable_cache(self, cache: StagFormerCache | None, use_cache: bool) -> StagFormerCache | None:
        if not self._computes_twice():
            return StagFormerCache() if cache is None and use_cache else cache
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("gradient checkpointing cannot use a filled cache; give all tokens, or call eval() before")
        if use_cache:
            logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing. It is off.")
        return None

    def _computes_twice(self) -> bool:
        # Without gradients, as in `generate`, checkpointing is off. With them, a cache would be filled twice.
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return False
        reentrant = getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if reentrant and self.config.share_section_weights and processes > 1:
            # Each call of a shared layer has its own backward pass. DDP would send the gradients after the first.
            raise ValueError("share_section_weights in several processes: checkpointing needs use_reentrant False")
        return True

    def _section_outputs(self, embeddings: Tensor, context: ForwardContext) -> list[Tensor]:
        outputs: list[Tensor] = []
        cache = {"cache": context.cache}  # by name: see _skip_keys_device_placement
        sections: Any = self.sections
        for section in sections:
            memory = section(outputs[-1], context.in_gap, **cache) if outputs else None
            hidden_states = embeddings.view_as(embeddings)  # gradients add up section by section, checkpointed or not
            for number, layer in enumerate(section.layers):
                tables = (context.rotary, context.visible, context.visible_memory, section.first_cache_layer + number)
                if memory is None or not self.config.share_section_weights:
                    hidden_states = layer(hidden_states, memory, *tables, **cache)
                else:
                    core = sections[0].layers[number]
                    hidden_states = core(hidden_states, None, *tables, feed=False, **cache)
                    hidden_states = layer(hidden_states, memory, *tables, **cache)
                    hidden_states = core(hidden_states, None, *tables, attend=False, **cache)
            outputs.append(hidden_states)
        return outputs


def _check_arguments(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, past_key_values: object, output_attentions: bool | None
) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if output_attentions:
        raise ValueError("the attention weights of a StagFormer are not computed one by one; output_attentions is off")
    if past_key_values is not None and not isinstance(past_key_values, StagFormerCache):
        raise ValueError(f"past_key_values is a {type(past_key_values).__name__}; only a StagFormerCache fits")
