"""Shape of a StagFormer, as `config.json` of a model directory spells it."""

from typing import Any

from transformers import PretrainedConfig

_ROPE_TYPES = ("default", "llama3")
_ROPE_THETA = 10000.0
_ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
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
        rope_theta, rope_scaling: the older spelling of `rope_parameters`; where both are given they must agree.
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
        rope_theta: float | None = None,
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
        self.check()

    def check(self) -> None:
        """Check the values. The model checks them again, because `from_pretrained` changes a finished configuration.

        Raises:
            ValueError: the values contradict each other or ask for what this model does not have.
        """
        if not self.section_layers or min(self.section_layers) < 1:
            raise ValueError(f"section_layers is {self.section_layers}; every section needs at least one layer")
        if self.stagger < 0:
            raise ValueError(f"stagger is {self.stagger}; a section cannot look ahead")
        if self.cross_attention_window is not None and self.cross_attention_window < 1:
            raise ValueError(f"cross_attention_window is {self.cross_attention_window}; a position must see a slot")
        if self.num_hidden_layers != sum(self.section_layers):
            layers = f"num_hidden_layers is {self.num_hidden_layers}, section_layers {self.section_layers}"
            raise ValueError(f"{layers} have {sum(self.section_layers)}; change both")
        if self.share_section_weights and len(set(self.section_layers)) > 1:
            raise ValueError(f"share_section_weights needs equal sections, section_layers is {self.section_layers}")
        for heads in (self.num_key_value_heads, self.cross_attention_key_value_heads):
            if self.num_attention_heads % heads:
                raise ValueError(f"{self.num_attention_heads} attention heads cannot share {heads} key/value heads")
        if (self.rope_parameters or {}).get("rope_theta") is None:
            raise ValueError(f"rope_parameters {self.rope_parameters} have no rope_theta")
        self.rope_parameters = _rope(None, None, self.rope_parameters)


def _rope(theta: float | None, scaling: dict[str, Any] | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Both spellings as one dictionary with `rope_theta` and `rope_type`."""
    given = {"rope_parameters": parameters, "rope_scaling": scaling}
    found = [_one_rope(name, rope, theta) for name, rope in given.items() if rope]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"rope_parameters {parameters} and rope_scaling {scaling} disagree; give one of them")
    return found[0] if found else {"rope_theta": _ROPE_THETA if theta is None else theta, "rope_type": "default"}


def _one_rope(name: str, rope: dict[str, Any], theta: float | None) -> dict[str, Any]:
    """One spelling with its type, base and, where its type has them, scaling keys."""
    if not isinstance(rope, dict):
        raise ValueError(f"{name} is {rope!r}; it must be a dictionary")
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope] or ["default"]
    if kinds[0] != kinds[-1]:
        raise ValueError(f"{name} has rope_type {kinds[0]!r} and type {kinds[1]!r}; give one of them")
    if kinds[0] not in _ROPE_TYPES:
        raise ValueError(f"rope_type {kinds[0]!r} is not one of {', '.join(_ROPE_TYPES)}")
    base = rope.get("rope_theta")
    if None not in (base, theta) and base != theta:
        raise ValueError(f"rope_theta is {theta} and in {name} {base}; give one of them")
    base = _ROPE_THETA if base is None and theta is None else theta if base is None else base
    made = {"rope_theta": base, "rope_type": kinds[0]}
    if kinds[0] == "default":
        return made
    absent = [key for key in _ROPE_SCALING if key not in rope]
    if absent:
        raise ValueError(f"{name} has rope_type {kinds[0]!r} but no {absent[0]}")
    return made | {key: rope[key] for key in _ROPE_SCALING}
