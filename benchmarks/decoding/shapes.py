"""Which models the decode benchmark compares: the same layers split in different places. Pure integers, no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError

Split = tuple[int, ...]
FURTHEST = 3
"""With two sections, at most this many layers are moved from the last section to the first."""
ONLY_STAGGERED = {"stagger", "cross_attention_window", "cross_attention_key_value_heads", "share_section_weights"}
ONLY_STAGGERED |= {"combine_sections"}


def sequential_twin(model: ModelConfig) -> ModelConfig:
    """The baseline of a staggered model: the plain Transformer with the same layers, split at the same places."""
    return ModelConfig(**(model.model_dump(exclude=ONLY_STAGGERED) | {"connection": "sequential"}))


def parse_split(text: str) -> Split:
    """`10+6` as layers of each section.

    Raises:
        ConfigError: it is something else.
    """
    try:
        split = tuple(int(part) for part in text.split("+"))
    except ValueError:
        split = ()
    if not split or min(split) < 1:
        raise ConfigError(f"{text!r} is no section split; give layers of each section such as 10+6")
    return split


def split_name(split: Sequence[int]) -> str:
    """`10+6`."""
    return "+".join(map(str, split))


def even_split(layers: int, sections: int) -> Split:
    """Layers spread evenly, earlier sections first.

    Raises:
        ConfigError: fewer layers than sections.
    """
    if layers < sections:
        raise ConfigError(f"{layers} layers cannot be split into {sections} sections; give each at least one")
    each, more = divmod(layers, sections)
    return tuple(each + (section < more) for section in range(sections))


def balanced_split(model: ModelConfig, sections: int) -> Split:
    """The split whose heaviest section has the fewest weights, cross-attention and head included."""
    even_split(model.num_layers, sections)
    hidden, heads, width = model.hidden_size, model.num_attention_heads, model.head_width
    plain = hidden * (2 * width * (heads + model.key_value_heads) + 3 * model.intermediate_size)
    cross = hidden * 2 * width * (heads + model.cross_key_value_heads)
    layer = [plain + (cross if section else 0) for section in range(sections)]
    weight = list(layer)
    weight[-1] += model.vocab_size * hidden
    split = [1] * sections
    for _ in range(model.num_layers - sections):
        lightest = min(range(sections), key=lambda section: weight[section] + layer[section])
        split[lightest] += 1
        weight[lightest] += layer[lightest]
    return tuple(split)


def default_splits(model: ModelConfig, sections: int) -> list[Split]:
    """Splits to try: even, balanced, and with two sections all between and one beyond."""
    even = even_split(model.num_layers, sections)
    if model.share_section_weights:
        return [even]
    splits = [even]
    if sections == 2:
        splits += [(even[0] + moved, even[1] - moved) for moved in range(1, FURTHEST + 1) if even[1] > moved]
    return list(dict.fromkeys([*splits, balanced_split(model, sections)]))


def changed(model: ModelConfig, keys: Mapping[str, Any]) -> ModelConfig:
    """The model with other keys.

    Raises:
        ConfigError: they contradict each other, or the number of layers changes.
    """
    made = model.model_copy(update=dict(keys))
    if made.num_layers != model.num_layers:
        raise ConfigError(
            f"the split {split_name(made.section_layers)} has {made.num_layers} layers and the model "
            f"{model.num_layers}; only models of equal depth are compared"
        )
    if problems := made.problems():
        raise ConfigError("; ".join(problems))
    return made


def baseline(model: ModelConfig, sections: int) -> ModelConfig:
    """The plain Transformer of equal depth, split evenly."""
    layers = even_split(model.num_layers, sections)
    return sequential_twin(changed(model, {"section_layers": layers, "share_section_weights": False}))
