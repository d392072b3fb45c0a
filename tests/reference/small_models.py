"""Small configurations of every kind of model, with tokens and weights for tests of the reference."""

from typing import Any

import torch
from torch import Tensor

from tests.reference.stagformer import Parameters, random_parameters

BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rope_theta": 100.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "section_layers": [2, 1],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # one wavelength is kept, one is in between, one is stretched
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one section": {"section_layers": [2]},
    "three unequal sections": {"section_layers": [1, 2, 1]},
    "stagger 0": {"stagger": 0},
    "stagger 2": {"stagger": 2},
    "window": {"cross_attention_window": 3},
    "shared": {"section_layers": [2, 2, 2], "share_section_weights": True},
    "combined": {"section_layers": [1, 1, 1], "combine_sections": True},
    "one cross-attention head": {"cross_attention_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3 scaling": {"rope_scaling": LLAMA3},
    "sequential": {"connection": "sequential"},
}


def tokens(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randint(BASE["vocab_size"], (rows, columns), generator=torch.Generator().manual_seed(seed))


def perturbed(config: dict[str, Any], dtype: torch.dtype = torch.float64) -> Parameters:
    return random_parameters(config, seed=3, dtype=dtype, perturb=True)
