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


def shape(variant: str) -> ModelConfig:
    """The configuration of a variant by name."""
    return ModelConfig(**BASE | VARIANTS[variant])


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
