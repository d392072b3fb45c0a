"""How many kernels a step launches, and that they compile for GPUs without spilling registers."""

import pytest
import torch

from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.decode.kernels.products import FEW_ROWS, choose_tile
from stagdist.decode.kernels.split_attention import PROGRAMS, SMALLEST_SPLIT, num_splits
from stagdist.decode.layers.weights import WeightFormat
from stagdist.decode.runtime.build import EngineOptions, use_kernels
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.errors import ConfigError
from tests.decode.kernels.recording import EmptyModel
from tests.ranks import ROOT
from tests.reference.variants import BASE, VARIANTS

SEQUENTIAL, STAGGERED, SHARED = (
    "paper-baseline-36l-2.8b", "paper-stagformer-2x18-2.9b", "paper-stagformer-shared-2x18"
)  # fmt: skip


def paper(name: str) -> ModelConfig:
    """A model of the paper."""
    return load_config(ROOT / "configs" / f"{name}.yaml").model


def shortened(model: ModelConfig, layers: int) -> ModelConfig:
    """The same with so many layers in each section."""
    return model.model_copy(update={"section_layers": (layers,) * model.num_sections})


# --- launches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kernels", "rows", "each"), [
    (SEQUENTIAL, True, 1, [5]), (STAGGERED, True, 1, [5, 8]), (SHARED, True, 2, [8]),
    (SEQUENTIAL, True, 16, [8]), (STAGGERED, True, 16, [8, 12]),
    (SEQUENTIAL, False, 1, [18]), (STAGGERED, False, 1, [18, 28]), (SHARED, False, 1, [29]),
])  # fmt: skip
def test_a_layer_is_few_kernels(name: str, kernels: bool, rows: int, each: list[int]) -> None:
    models = [EmptyModel(shortened(paper(name), layers), rows, kernels=kernels) for layers in (1, 3)]
    counts = [len(model.step(rows).names) for model in models]
    rounded = [EmptyModel(shortened(paper(name), n), rows, kernels=kernels, weights="int8") for n in (1, 3)]
    if kernels and rows <= FEW_ROWS:
        # The head in int8 is one kernel with its norm.
        assert [len(model.step(rows).names) for model in rounded] == [count - 1 for count in counts]
    layers_more = 2 * (paper(name).num_sections if name == SEQUENTIAL else 1)
    assert counts[1] - counts[0] == layers_more * sum(each)


@pytest.mark.parametrize(
    ("name", "before", "after"), [(SEQUENTIAL, 662, 189), (STAGGERED, 857, 247), (SHARED, 559, 158)]
)
def test_a_step_of_the_paper_is_less_than_a_third_of_the_kernels(name: str, before: int, after: int) -> None:
    counts = [len(EmptyModel(paper(name), 1, kernels=kernels).step(1, Mode.GREEDY).names) for kernels in (False, True)]
    assert counts == [before, after]


@pytest.mark.parametrize(
    ("kernels", "mode", "more"),
    [(True, Mode.SAMPLED, 0), (True, Mode.TRUNCATED, 11), (False, Mode.SAMPLED, 87), (False, Mode.TRUNCATED, 152)],
)
def test_sampling_adds_few_kernels_to_a_greedy_step(kernels: bool, mode: Mode, more: int) -> None:
    model = EmptyModel(shortened(paper(SHARED), 1), 1, kernels=kernels)
    assert len(model.step(1, mode).names) == len(model.step(1, Mode.GREEDY).names) + more


def test_each_weight_is_read_by_one_launch_for_all_rows() -> None:
    recorded = EmptyModel(shortened(paper(SHARED), 2), 4, kernels=True).step(4)
    products = [dict(launch.values) for launch in recorded.launches if launch.name == "product_kernel"]
    shapes = [(each["rows"], each["columns"], each["width"]) for each in products]
    per_layer = [(8, 4608, 1536), (8, 1536, 1536), (4, 1536, 1536), (4, 1536, 1536), (8, 12288, 1536), (8, 1536, 12288)]
    assert sorted(shapes) == sorted([*per_layer * 2, (4, 2 * 2 * 1536, 1536)])


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("columns", "width"), [(1536, 1536), (1536, 12288), (4608, 1536), (37, 6), (4096, 14336)])
def test_tiles_fit_registers_and_occupy_the_gpu(rows: int, columns: int, width: int) -> None:
    tile = choose_tile(rows, columns, width, 2)
    vector = 8
    assert tile.lanes * vector <= 2 * width or tile.lanes == 1
    threads = 32 * tile.num_warps
    assert 8 <= tile.block_n * tile.lanes * 16 // threads <= 8 * 16
    assert columns < 512 or columns // tile.block_n >= 512
    assert -(-width // (tile.lanes * vector)) % tile.unroll == 0
    gated = choose_tile(rows, columns, width, 2, gated=True)
    assert gated.block_n <= tile.block_n


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64, 500])
@pytest.mark.parametrize("entries", [1, 64, 65, 4096, 131072])
def test_splits_fill_the_gpu_and_have_enough_entries(rows: int, entries: int) -> None:
    splits = num_splits(rows, 12, entries)
    assert splits == 1 or (splits * rows * 12 <= PROGRAMS and (splits - 1) * SMALLEST_SPLIT < entries)


# --- compiled without a GPU -------------------------------------------------------------------------------------


def test_kernels_of_the_paper_compile_without_spilling() -> None:
    recorded = EmptyModel(shortened(paper(SHARED), 1), 1, kernels=True).step(1)
    first = {launch.name: launch for launch in reversed(recorded.launches)}
    assert set(first) == {"product_kernel", "attention_kernel", "memory_store_kernel"}
    for launch in first.values():
        resources = launch.resources(90)
        assert 0 < resources["REG"] <= 255
        assert resources["LOCAL"] == resources["STACK"] == 0, (launch.name, resources)


def test_products_with_int8_weights_compile_without_spilling() -> None:
    recorded = EmptyModel(shortened(paper(SHARED), 1), 1, kernels=True, weights="int8").step(1)
    products = [launch for launch in dict.fromkeys(recorded.launches) if launch.name == "product_kernel"]
    by_shape = {dict(launch.values)["GATED"]: launch for launch in products}
    assert set(by_shape) == {False, True}
    for launch in by_shape.values():
        values = dict(launch.values)
        assert (values["weight"], values["scales"], values["VECTOR"]) == (torch.int8, torch.float32, 16)
        resources = launch.resources(90)
        assert 0 < resources["REG"] <= 255
        assert resources["LOCAL"] == resources["STACK"] == 0, (launch.values, resources)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_all_kernels_of_the_paper_compile_without_spilling(
    rows: int, capability: int, weights: WeightFormat | None
) -> None:
    launches = [
        launch
        for name in (STAGGERED, SHARED)
        for launch in EmptyModel(paper(name), rows, kernels=True, weights=weights).step(rows).launches
    ]
    for launch in dict.fromkeys(launches):
        resources = launch.resources(capability)
        assert resources["LOCAL"] == resources["STACK"] == 0, (launch.name, launch.values, resources)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("key_heads", [32, 8, 4, 2, 1])
def test_grouped_queries_compile_without_spilling(key_heads: int, capability: int) -> None:
    keys = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    model = ModelConfig(**BASE | keys | {"num_key_value_heads": key_heads, "max_position_embeddings": 1024})
    recorded = EmptyModel(model, 1, kernels=True).step(1)
    launches = [launch for launch in dict.fromkeys(recorded.launches) if launch.name == "attention_kernel"]
    assert len(launches) == 2
    for launch in launches:
        resources = launch.resources(capability)
        assert resources["LOCAL"] == resources["STACK"] == 0, resources


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "weights"), [("fp64", None), ("fp32", None), ("fp16", None), ("fp64", "int8"), ("fp32", "int8")]
)
def test_kernels_compile_for_every_precision_and_any_size_of_heads(
    precision: str, weights: WeightFormat | None
) -> None:
    keys = BASE | VARIANTS["three sections with everything"] | VARIANTS["wide heads"]
    recorded = EmptyModel(ModelConfig(**keys), 2, kernels=True, precision=precision, weights=weights).step(2)
    for launch in dict.fromkeys(recorded.launches):
        assert launch.resources(90)["REG"] > 0


# --- where kernels are refused ----------------------------------------------------------------------------------


def test_kernels_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "/opt/bin/cc")
    monkeypatch.setattr("pathlib.Path.is_file", lambda _: True)  # Python.h
    asked = EngineOptions(kernels=True)
    with pytest.raises(ConfigError, match="kernels run on a GPU, not on 'cpu'; .* TRITON_INTERPRET=1"):
        use_kernels(asked, "cpu", True)
    with pytest.raises(ConfigError, match="give graphs=True as well"):
        use_kernels(asked, "cuda:0", False)
    assert not use_kernels(EngineOptions(), "cpu", True)
    assert not use_kernels(EngineOptions(), "cuda:0", False)
    assert use_kernels(EngineOptions(), "cuda:0", True)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CC", raising=False)
        with pytest.raises(ConfigError, match="no C compiler; install gcc or set CC"):
            use_kernels(EngineOptions(), "cuda:0", True)
        patch.setenv("CC", "/opt/bin/cc")
        assert use_kernels(EngineOptions(), "cuda:0", True)
        patch.setattr("pathlib.Path.is_file", lambda _: False)
        with pytest.raises(ConfigError, match="no Python.h; install python3-dev"):
            use_kernels(EngineOptions(), "cuda:0", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_kernels(asked, "cpu", True)
