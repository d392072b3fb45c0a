"""The baseline as a GGUF file, which llama.cpp reads."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stagdist.config.parts import ModelConfig

GGUF_TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
"""Type of the matrices by precision. Q8_0 has a scale of 16 bits for every 32 weights of a row. Norms stay fp32."""
WORD = "w"
"""The word of token 7 is w7. None ends a text."""

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Name in a GGUF file of a Llama's parameter in transformers."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_PARTS[part]}.weight"


def rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads D, H] in the order in which llama.cpp rotates them.

    transformers rotates value i of a head with value i + D / 2, llama.cpp value 2 i with value 2 i + 1.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: ModelConfig, weights: Mapping[str, Tensor], precision: str) -> None:
    """Write the sequential model with a vocabulary of made-up words, which no prompt of the benchmark uses.

    Args:
        weights: fp32, by their names in transformers.
        precision: a key of `GGUF_TYPES`.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.key_value_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("rwkv")  # the only type of tokenizer without a default end token
    writer.add_token_list([f"{WORD}{token}" for token in range(model.vocab_size)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * model.vocab_size)
    kind = gguf.GGMLQuantizationType[GGUF_TYPES[precision]]
    heads = {"q_proj": model.num_attention_heads, "k_proj": model.key_value_heads}
    for name, weight in weights.items():
        projection = name.split(".")[-2]
        values = (rotary_pairs(weight, heads[projection]) if projection in heads else weight).contiguous().numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
