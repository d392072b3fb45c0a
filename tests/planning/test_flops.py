"""FLOPs against arithmetic by hand."""

import pytest

from stagdist.config.parts import ModelConfig
from stagdist.planning.flops import attended_pairs, flops_per_token, section_flops

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 10,
    "section_layers": (2, 3),
}


@pytest.mark.parametrize("window, pairs", [(None, 15), (1, 5), (2, 9), (3, 12), (5, 15), (9, 15)])
def test_a_causal_window_lets_through_exactly_these_pairs(window: int | None, pairs: int) -> None:
    counted = sum(1 for query in range(5) for key in range(5) if 0 <= query - key < (window or 5))
    assert attended_pairs(5, window) == counted == pairs


def test_a_staggered_model_by_hand() -> None:
    first, second = section_flops(ModelConfig(**SHAPE), 10)
    # q and o: 8 x 8, k and v: 8 x 4, three matrices of the MLP: 8 x 24.
    layer = 2 * 64 + 2 * 32 + 3 * 192
    cross = 2 * 64 + 2 * 32
    scores_and_sums = 2 * 2 * 8 * 55 / 10  # 55 pairs of 10 positions, width 8, a product for scores, one for sums
    assert (first.projections, first.head, first.cross_attention) == (3 * 2 * 2 * layer, 0, 0)
    assert second.projections == 3 * 2 * 3 * (layer + cross)
    assert second.head == 3 * 2 * 8 * 100
    assert first.attention == pytest.approx(3 * 2 * scores_and_sums)
    assert second.attention == second.cross_attention == pytest.approx(3 * 3 * scores_and_sums)
    assert flops_per_token(ModelConfig(**SHAPE), 10) == pytest.approx(first.total + second.total)


def test_a_window_and_fewer_heads_make_cross_attention_cheaper() -> None:
    full = section_flops(ModelConfig(**SHAPE), 10)[1]
    window = section_flops(ModelConfig(**SHAPE, cross_attention_window=3), 10)[1]
    fewer = section_flops(ModelConfig(**SHAPE, cross_attention_key_value_heads=1), 10)[1]
    assert window.cross_attention == pytest.approx(full.cross_attention * 27 / 55)
    assert window.projections == full.projections
    assert full.projections - fewer.projections == 3 * 2 * 3 * (2 * 8 * 2)
    assert fewer.cross_attention == full.cross_attention


def test_sequential_differs_by_the_cross_attention_alone_and_sharing_by_nothing() -> None:
    staggered = ModelConfig(**SHAPE | {"section_layers": (2, 2)})
    sequential = ModelConfig(**SHAPE | {"section_layers": (2, 2), "connection": "sequential"})
    shared = ModelConfig(**SHAPE | {"section_layers": (2, 2), "share_section_weights": True})
    cross_weights = 3 * 2 * 2 * (2 * 64 + 2 * 32)
    second = section_flops(staggered, 10)[1]
    difference = flops_per_token(staggered, 10) - flops_per_token(sequential, 10)
    assert difference == pytest.approx(cross_weights + second.cross_attention)
    assert flops_per_token(shared, 10) == flops_per_token(staggered, 10)


def test_a_wider_head_than_hidden_size_over_heads_counts_as_it_is() -> None:
    wide = section_flops(ModelConfig(**SHAPE, head_dim=6), 10)[0]
    assert wide.projections == 3 * 2 * 2 * (2 * 8 * 24 + 2 * 8 * 12 + 3 * 192)
    assert wide.attention == pytest.approx(3 * 2 * 4 * 24 * 5.5)
