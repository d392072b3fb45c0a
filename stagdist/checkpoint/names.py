"""Canonical names <-> the names of a Hugging Face Llama, for the sequential baseline."""

import re

from stagdist.config.parts import ModelConfig

_FIXED = {
    "embedding.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_PARTS = {
    "self_attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "self_attention": "self_attn",
    "mlp": "mlp",
}
_SECTION = re.compile(r"sections\.(\d+)\.layers\.(\d+)\.(\w+)\.(.+)")


def llama_name(name: str, model: ModelConfig) -> str:
    """Llama's name of a canonical parameter; layers are counted through all sections."""
    if name in _FIXED:
        return _FIXED[name]
    match = _SECTION.fullmatch(name)
    assert match, f"{name} has no place in a Llama"
    section, layer, part, rest = int(match[1]), int(match[2]), match[3], match[4]
    return f"model.layers.{sum(model.section_layers[:section]) + layer}.{_PARTS[part]}.{rest}"
