"""The baseline that a staggered model is measured against."""

from stagdist.config.parts import ModelConfig


def sequential_twin(model: ModelConfig) -> ModelConfig:
    """The plain Transformer with the same layers, cut at the same places."""
    only_staggered = {
        "stagger",
        "cross_attention_window",
        "cross_attention_key_value_heads",
        "share_section_weights",
        "combine_sections",
    }
    return ModelConfig(**(model.model_dump(exclude=only_staggered) | {"connection": "sequential"}))
