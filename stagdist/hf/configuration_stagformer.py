"""Shape of a StagFormer, as `config.json` of a model directory spells it."""

from typing import Any

from transformers import PretrainedConfig

_ROPE_TYPES = ("default", "llama3")
_ONLY = {"connection": "staggered", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class StagFormerConfig(PretrainedConfig):
    """Configuration of `StagFormerForCausalLM`.

    A StagFormer is a decoder-only Transformer cut into sections. Every section starts from the token embeddings;
    each but the first also looks, by cross-attention, at what the section before it gave at earlier positions.

    Args:
        section_layers: layers of each section.
        stagger: positions by which a section's view of the one before it lags.
        cross_attention_window: slots of that view that a position sees; None for all earlier ones.
        cross_attention_key_value_heads: key/value heads of cross-attention; None for `num_key_value_heads`.
        share_section_weights: equal sections share self-attention and MLP; cross-attention stays their own.
        combine_sections: the head reads a learned combination of all section outputs, not the last one.
        rope_theta, rope_scaling: the older spelling of `rope_parameters`, which wins where both are given.
        kwargs: what every configuration of transformers has.

    The other arguments are those of a Llama.

    Raises:
        ValueError: the values contradict each other or ask for what this model does not have.
    """

    model_type = "stagformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        section_layers: list[int] | tuple[int, ...] = (12, 12),
        stagger: int = 1,
        cross_attention_window: int | None = None,
        cross_attention_key_value_heads: int | None = None,
        share_section_weights: bool = False,
        combine_sections: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        for key, only in _ONLY.items():
            if kwargs.pop(key, only) != only:
                raise ValueError(f"a StagFormer has {key} {only!r} and nothing else")
        kwargs.pop("num_hidden_layers", None)  # written for tools that look for it; section_layers decides
        super().__init__(**kwargs)
        self.connection = "staggered"
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = _rope(rope_theta, rope_scaling, rope_parameters)
        self.tie_word_embeddings = tie_word_embeddings
        self.section_layers = list(section_layers)
        self.num_hidden_layers = sum(section_layers)
        self.stagger = stagger
        self.cross_attention_window = cross_attention_window
        self.cross_attention_key_value_heads = cross_attention_key_value_heads or self.num_key_value_heads
        self.share_section_weights = share_section_weights
        self.combine_sections = combine_sections
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self._check()

    def _check(self) -> None:
        if not self.section_layers or min(self.section_layers) < 1:
            raise ValueError(f"section_layers is {self.section_layers}; every section needs at least one layer")
        if self.stagger < 0:
            raise ValueError(f"stagger is {self.stagger}; a section cannot look ahead")
        if self.share_section_weights and len(set(self.section_layers)) > 1:
            raise ValueError(f"share_section_weights needs equal sections, section_layers is {self.section_layers}")
        for heads in (self.num_key_value_heads, self.cross_attention_key_value_heads):
            if self.num_attention_heads % heads:
                raise ValueError(f"{self.num_attention_heads} attention heads cannot share {heads} key/value heads")


def _rope(theta: float, scaling: dict[str, Any] | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Both spellings as one dictionary with `rope_theta` and `rope_type`."""
    merged = {"rope_theta": theta, "rope_type": "default", **(scaling or {}), **(parameters or {})}
    if merged["rope_type"] not in _ROPE_TYPES:
        raise ValueError(f"rope_type {merged['rope_type']!r} is not one of {', '.join(_ROPE_TYPES)}")
    return merged
