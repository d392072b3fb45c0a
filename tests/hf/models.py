"""Small StagFormers of `transformers` with the reference's weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stagdist.checkpoint.published.model_writer import config_json, stored_name
from stagdist.config.parts import ModelConfig
from stagdist.hf.configuration_stagformer import StagFormerConfig
from stagdist.hf.modeling_stagformer import StagFormerForCausalLM
from tests.reference import stagformer as reference
from tests.reference.variants import BASE, VARIANTS

END = 0
"""The end-of-document token."""
STAGGERED = [name for name, change in VARIANTS.items() if change.get("connection") != "sequential"]
DEEP: dict[str, dict[str, Any]] = {
    "deep": {"section_layers": [3, 2, 3], "stagger": 2, "cross_attention_window": 3},
    "deep, shared, combined": {"section_layers": [3, 3, 3], "share_section_weights": True, "combine_sections": True},
}
"""Variants of several layers, where the order of additions is seen in the last bits."""


def shape(variant: str) -> ModelConfig:
    """The configuration of a variant by name."""
    return ModelConfig(**BASE | (VARIANTS | DEEP)[variant])


def build(variant: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    """A variant in evaluation mode, and its parameters by canonical name."""
    model = shape(variant)
    parameters = reference.random_parameters(model, seed=5, dtype=dtype, perturb=True)
    body: dict[str, Any] = config_json(model, torch.float32, END) | {"pad_token_id": END}
    made: Any
    made = StagFormerForCausalLM(StagFormerConfig(**body)) if model.staggered else LlamaForCausalLM(LlamaConfig(**body))
    made = made.to(dtype)
    named = {stored_name(name, model): value for name, value in parameters.items()}
    missing, unexpected = made.load_state_dict(named, strict=False)
    tied = ["head.weight" if model.staggered else "lm_head.weight"] if model.tie_word_embeddings else []
    assert (missing, unexpected) == (tied, [])
    return made.eval(), parameters


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, never the end of a document. Shape: int64 [rows, length]."""
    return torch.randint(1, BASE["vocab_size"] - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Exactly six new tokens for every prompt; the same noise at every call. Shape: [rows, 6]."""
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    new: Tensor = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    assert new.shape[1] == 6
    return new
