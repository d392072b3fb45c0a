"""Every value of a model has one place in DeepSpeed's files, on every grid."""

from math import prod

import pytest

from stagdist.checkpoint.training.stage_files import (
    FlatGroup,
    extra_keys,
    flat_groups,
    layer_parameters,
    pipeline_layers,
    stage_order,
    stored_specs,
    tensor_files,
)
from stagdist.config.parts import ModelConfig
from stagdist.parallel.layout import stage_parameters
from tests.reference.variants import BASE, VARIANTS

GRIDS = [(1, 1, 1), (1, 3, 1), (2, 1, 2), (2, 2, 1), (3, 1, 2), (4, 2, 2)]


def cases() -> list[tuple[str, tuple[int, int, int]]]:
    """Variants on the grids that fit them."""
    return [
        (name, grid)
        for name, keys in {"default": {}, **VARIANTS}.items()
        for grid in GRIDS
        if len((BASE | keys)["section_layers"]) % grid[0] == 0 and not (grid[2] == 2 and "head_dim" in keys)
    ]


def model_of(name: str) -> ModelConfig:
    """The model of a variant."""
    return ModelConfig(**BASE | VARIANTS.get(name, {}))


@pytest.mark.parametrize(("name", "sizes"), cases())
def test_partitions_are_filled_without_gap_or_overlap(name: str, sizes: tuple[int, int, int]) -> None:
    model = model_of(name)
    for stage in range(sizes[0]):
        for group in flat_groups(model, sizes, stage):
            taken = [[False] * group.partition_size for _ in range(sizes[1])]
            for stored, pieces in group.pieces():
                assert [piece.offset for piece in pieces] == _starts([piece.length for piece in pieces])
                assert sum(piece.length for piece in pieces) == prod(stored.spec.local_shape(sizes[2]))
                for piece in pieces:
                    assert not any(taken[piece.data_rank][piece.start : piece.start + piece.length])
                    taken[piece.data_rank][piece.start : piece.start + piece.length] = [True] * piece.length
            free = [partition.count(False) for partition in taken]
            assert free == [group.padding(rank) for rank in range(sizes[1])]
            assert sum(free) < 2 * sizes[1], "more padding than DeepSpeed's alignment asks for"


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


@pytest.mark.parametrize(("name", "sizes"), cases())
def test_stages_hold_what_the_layout_table_says(name: str, sizes: tuple[int, int, int]) -> None:
    model = model_of(name)
    for stage in range(sizes[0]):
        ours = sorted(
            "section_mix" if one.spec.name.startswith("section_mix.") else one.spec.name
            for one in stage_order(model, sizes[0], stage)
        )
        expected = [spec.name for spec in stage_parameters(model, sizes[0], stage)]
        parts = (model.num_sections // sizes[0] - 1) * model.combine_sections
        assert ours == sorted(expected + ["section_mix"] * parts)
        names = [one.name for one in stage_order(model, sizes[0], stage)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["default", *VARIANTS])
def test_every_parameter_is_stored_in_one_layer_file(name: str) -> None:
    model = model_of(name)
    stored = [one for layer in pipeline_layers(model) if layer.first for one in layer_parameters(model, layer)]
    assert sorted(one.spec.name for one in stored) == sorted(spec.name for spec in stored_specs(model))
    for layer in pipeline_layers(model):
        keys = extra_keys(model, layer)
        assert {one.key for one in layer_parameters(model, layer)} <= set(keys) and len(set(keys)) == len(keys)


def test_padding_may_fill_whole_partitions() -> None:
    model = ModelConfig(**BASE)
    _, vectors = flat_groups(model, (1, 1, 1), 0)
    few = FlatGroup(vectors.parameters[:1], 1, 16)  # 16 values for 16 ranks, two each at least
    assert few.partition_size == 2
    assert [few.padding(rank) for rank in range(16)] == [0] * 8 + [2] * 8


def test_files_are_named_as_deepspeed_names_them() -> None:
    names = tensor_files(model_of("tied"), (2, 2, 1), bf16=True)
    assert set(names) == {
        "layer_00-model_00-model_states.pt",
        "layer_01-model_00-model_states.pt",
        "layer_03-model_00-model_states.pt",
        "layer_05-model_00-model_states.pt",
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        *(f"bf16_zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt" for data in (0, 1) for rank in (0, 1)),
    }
