"""Which models the decode benchmark compares: the same layers cut in different places. Pure integers, no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._bench.twin import sequential_twin
from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError

Split = tuple[int, ...]
FURTHEST = 3
"""Layers moved from the last section to the first at most, when two sections are tried."""


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
        raise ConfigError(f"{layers} layers cannot be cut into {sections} sections; give each section at least one")
    each, more = divmod(layers, sections)
    return tuple(each + (section < more) for section in range(sections))


def balanced_split(model: ModelConfig, sections: int) -> Split:
    """Layers spread so that the heaviest section has the fewest weights: cross-attention and the head are heavy."""
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
    """Splits worth trying: even, balanced, and with two sections all between and one beyond."""
    even = even_split(model.num_layers, sections)
    if model.share_section_weights:
        return [even]
    splits = [even]
    if sections == 2:
        splits += [(even[0] + moved, even[1] - moved) for moved in range(1, FURTHEST + 1) if even[1] > moved]
    return list(dict.fromkeys([*splits, balanced_split(model, sections)]))


def with_split(model: ModelConfig, split: Split, **keys: Any) -> ModelConfig:
    """The model cut elsewhere, and with other keys.

    Raises:
        ConfigError: not as many layers, or the keys contradict each other.
    """
    if sum(split) != model.num_layers:
        raise ConfigError(
            f"the split {split_name(split)} has {sum(split)} layers and the model {model.num_layers}; "
            "only models of equal depth are compared"
        )
    return changed(model, {"section_layers": split} | keys)


def changed(model: ModelConfig, keys: Mapping[str, Any]) -> ModelConfig:
    """The model with other keys.

    Raises:
        ConfigError: they contradict each other.
    """
    made = model.model_copy(update=dict(keys))
    problems = made.problems()
    if problems:
        raise ConfigError("; ".join(problems))
    return made


def baseline(model: ModelConfig, sections: int) -> ModelConfig:
    """The plain Transformer of equal depth, cut evenly."""
    return sequential_twin(changed(model, {"section_layers": even_split(model.num_layers, sections),
                                           "share_section_weights": False}))  # fmt: skip
