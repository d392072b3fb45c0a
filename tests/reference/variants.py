"""Every way to configure a model, in one small size: what parity tests run through."""

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 37,  # odd, so that every run with two tensor ranks has a padded vocabulary
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "rope_theta": 100.0,
    "max_position_embeddings": 16,
    "section_layers": [1, 1],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # one wavelength is kept, one is stretched
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one section": {"section_layers": [2]},
    "one section, tied": {"section_layers": [2], "tie_word_embeddings": True},
    "three sections": {"section_layers": [1, 1, 1]},
    "four sections": {"section_layers": [1, 1, 1, 1]},
    "unequal sections": {"section_layers": [2, 1]},
    "stagger 0": {"stagger": 0},
    "stagger 2": {"stagger": 2},
    "window": {"cross_attention_window": 3},
    "shared": {"section_layers": [2, 2], "share_section_weights": True},
    "combined": {"combine_sections": True},
    "fewer cross-attention heads": {"cross_attention_key_value_heads": 2},
    "grouped queries": {"num_key_value_heads": 2, "cross_attention_key_value_heads": 4},
    "wide heads": {"head_dim": 6},
    "tied": {"tie_word_embeddings": True},
    "sequential": {"connection": "sequential"},
    "sequential, tied": {"connection": "sequential", "tie_word_embeddings": True},
    "whole vocabulary": {"vocab_size": 36},
    "llama3 scaling": {"rope_scaling": LLAMA3},
    "three sections with everything": {
        "section_layers": [1, 1, 1],
        "stagger": 2,
        "cross_attention_window": 4,
        "share_section_weights": True,
        "combine_sections": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
    },
    "four combined sections": {"section_layers": [1, 1, 1, 1], "combine_sections": True},
}
"""Every way to configure a model, by name; added to `BASE`."""
