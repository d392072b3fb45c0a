"""Weights in int8: how they are rounded, their products, and that every grid holds parts of the same ones."""

import pytest
import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.frontend.command_line import add_running_options, from_options, model_parser
from stagdist.decode.layers import matrix, weights
from stagdist.decode.layers.matrix import Int8Matrix, Matrix, linear, quantize
from stagdist.decode.layers.weights import Device, Shard, StageWeights, WeightLoader
from stagdist.decode.runtime.build import EngineOptions, plan_decoding
from stagdist.decode.topology import HEAD_LAYOUTS, HeadLayout
from stagdist.errors import ConfigError
from stagdist.parallel.layout import ParameterSpec
from tests.decode.comparison import rounded_rows
from tests.decode.decoding import Case, config_of, reader
from tests.reference.variants import VARIANTS


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(rows * columns)
    sizes = torch.logspace(-3, 2, rows)[:, None]
    return (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)


def exact(held: Int8Matrix) -> Tensor:
    """What a matrix stands for, in fp64."""
    return held.values.double() * held.scales.double()[:, None]


# --- rounding ---------------------------------------------------------------------------------------------------


def test_a_row_is_multiples_of_its_largest_magnitude_over_127_half_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.6], [0.0, 0.0, 0.0, 0.0, 0.0], [-1.0, 0.25, 0.0, 0.5, 1.0]])
    found = quantize(weight)
    assert found.values.tolist() == [[127, 0, 2, -2, -127], [0] * 5, [-127, 32, 0, 64, 127]]
    assert found.scales.tolist() == [1.0, 1.0, pytest.approx(1 / 127)]
    assert (found.values.dtype, found.scales.dtype, found.nbytes) == (torch.int8, torch.float32, 15 + 12)


def test_an_entry_moves_by_half_a_step_at_most() -> None:
    weight = random_weight(50, 40)
    found = quantize(weight)
    moved = (exact(found) - weight.double()).abs()
    assert (moved <= found.scales[:, None].double() * (0.5 + 1e-5)).all()
    assert float((moved / found.scales[:, None]).max()) > 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_weight_has_the_same_values_from_every_dtype_that_holds_it(dtype: torch.dtype) -> None:
    weight = random_weight(20, 30, torch.bfloat16)
    one, other = quantize(weight.float()), quantize(weight.to(dtype))
    assert torch.equal(one.values, other.values) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("tiny", [1e-38, 1e-44])
def test_tiny_rows_have_finite_values(tiny: float) -> None:
    found = quantize(torch.tensor([[tiny, -tiny, 0.0]]))
    assert exact(found).isfinite().all()
    assert found.values.abs().max() <= 127


def test_a_row_with_nan_is_not_hidden() -> None:
    found = quantize(torch.tensor([[1.0, float("nan")], [1.0, 2.0], [0.0, 0.0]]))
    assert found.scales.isnan().tolist() == [True, False, False]


# --- products ---------------------------------------------------------------------------------------------------

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("width", [32, 96, 20, 45])
def test_a_product_is_that_of_the_weight_it_stands_for(dtype: torch.dtype, rows: int, width: int) -> None:
    held = quantize(random_weight(33, width))
    scales = held.scales.to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)[1:]
    found = linear(x, Int8Matrix(held.values, scales))
    assert (found.shape, found.dtype) == ((1, rows, 33), dtype)
    expected = x.double() @ exact(held).t()
    size = x.double().abs() @ exact(held).abs().t()  # of the sum's terms
    assert ((found.double() - expected).abs() <= TOLERANCES[dtype] * size).all()


def test_a_product_in_pieces_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    held, x = quantize(random_weight(33, 16)), torch.randn(3, 16, dtype=torch.float64)
    expected = linear(x, held)
    monkeypatch.setattr(matrix, "_CPU_PIECE_BYTES", 10 * 16 * 8)
    torch.testing.assert_close(linear(x, held), expected)


@pytest.mark.parametrize("has_instructions", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_many_rows_in_bf16_are_the_product(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool, rounded: bool
) -> None:
    monkeypatch.setattr(matrix, "_computes_bf16", lambda: has_instructions)
    held = quantize(random_weight(70, 40))
    weight: Matrix = held if rounded else exact(held).to(torch.bfloat16)
    x = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    dense = exact(held) if rounded else exact(held).to(torch.bfloat16).double()
    expected = x.double() @ dense.T
    found = linear(x, weight)
    assert found.dtype == torch.bfloat16
    assert float(((found.double() - expected).abs() / expected.abs().amax((0, 1))).max()) < 8e-3


def test_a_product_with_a_strided_row_is_the_product() -> None:
    held, x = quantize(random_weight(9, 64)), torch.randn(4, 3, 64, dtype=torch.bfloat16)
    for rows in (x[:, 1], x[:, 1:2], x[1:2, 2]):
        assert torch.equal(linear(rows, held), linear(rows.contiguous(), held))


def test_an_empty_part_of_a_head_gives_no_logits() -> None:
    empty = Int8Matrix(torch.empty(0, 32, dtype=torch.int8), torch.empty(0))
    for dtype in TOLERANCES:
        assert linear(torch.ones(2, 32, dtype=dtype), empty).shape == (2, 0)


# --- what ranks hold --------------------------------------------------------------------------------------------

GRIDS = [(2, 1), (1, 2), (2, 2)]


def load(case: Case, pipe: int, tensor: int, place: tuple[int, int], precision: torch.dtype) -> StageWeights:
    """The weights of one rank of a grid."""
    plan = plan_decoding(ModelConfig(**config_of(case.keys)), case.options, pipe * tensor)
    loader = WeightLoader(plan.model, reader(case), Shard(place[1], tensor), Device("cpu", precision), "int8")
    return loader.stage(plan.topology, place[0])


def dense(held: Matrix | None) -> Tensor:
    """The same of a matrix that is in int8 for a computation in fp64."""
    assert isinstance(held, Int8Matrix)
    assert held.values.is_contiguous() and held.scales.dtype == torch.float64
    return exact(held)


@pytest.mark.parametrize("head", HEAD_LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["tied", "sequential"])
def test_ranks_hold_parts_of_the_same_rounded_matrices(name: str, grid: tuple[int, int], head: HeadLayout) -> None:
    pipe, tensor = grid
    case = Case(name, VARIANTS[name], [], EngineOptions(tensor, head, precision="fp64", weights="int8"))
    ranks = {
        (stage, rank): load(case, pipe, tensor, (stage, rank), torch.float64)
        for stage in range(pipe)
        for rank in range(tensor)
    }
    read = reader(case)

    def rounded(spec: str, shape: tuple[int, ...]) -> Tensor:
        return rounded_rows(read(ParameterSpec(spec, shape), 0, 0, shape[0]))

    hidden, inner = 16, 24
    vocabulary = rounded("embedding.weight" if name == "tied" else "head.weight", (37, hidden))
    found = [held.head for held in ranks.values() if held.head is not None]
    assert torch.equal(torch.cat([dense(part) for part in found]), vocabulary)
    for stage in range(pipe):
        for section in ranks[stage, 0].sections:
            prefix = f"sections.{section}.layers.0."
            layers = [ranks[stage, rank].sections[section].layers[0] for rank in range(tensor)]
            for attribute, spec, width in (("o", "self_attention.o_proj", hidden), ("down", "mlp.down_proj", inner)):
                complete = rounded(f"{prefix}{spec}.weight", (hidden, width))
                assert torch.equal(torch.cat([dense(getattr(layer, attribute)) for layer in layers], 1), complete)
            query = rounded(f"{prefix}self_attention.q_proj.weight", (hidden, hidden))
            assert torch.equal(torch.cat([dense(each.qkv)[: hidden // tensor] for each in layers]), query)


def test_reading_in_pieces_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tied", VARIANTS["tied"], [], EngineOptions(precision="fp64", weights="int8"))
    expected = load(case, 1, 1, (0, 0), torch.float64).tensors()
    monkeypatch.setattr(weights, "READ_BYTES", 5 * 16 * 4)
    found = load(case, 1, 1, (0, 0), torch.float64).tensors()
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_int8_holds_a_byte_of_each_entry_and_four_of_each_row() -> None:
    case = Case("tied", VARIANTS["tied"], [], EngineOptions(weights="int8"))
    held = load(case, 1, 1, (0, 0), torch.float32)
    entries = rows = floats = 0
    for tensor in held.tensors():
        if tensor.dtype == torch.int8:
            entries, rows = entries + tensor.numel(), rows + len(tensor)
        else:
            floats += tensor.numel()
    layer = 4 * 16 * 16 + 3 * 16 * 24
    assert entries == 2 * layer + 4 * 16 * 16 + 37 * 16  # the second section has cross-attention; and the head
    vectors = 5 * 16 + 2 * 16 + 16  # norms of layers, memory norm and null vector, output norm
    assert floats == rows + 37 * 16 + vectors


# --- what is refused --------------------------------------------------------------------------------------------


def test_formats_that_do_not_exist_or_do_not_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights \(--weights\) is 'int4'; give int8"):
        EngineOptions(weights="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="do not work in fp16.* choose bf16 or fp32"):
        EngineOptions(weights="int8", precision="fp16")
    parser = model_parser("generate.py", None, "")
    add_running_options(parser, slots=1, timeout_s=60, what="prompts")
    arguments = parser.parse_args(["--model", "m", "--weights", "int8"])
    assert from_options(EngineOptions, arguments).weights == "int8"
    with pytest.raises(ConfigError, match="--weights: invalid choice: 'int4'"):
        parser.parse_args(["--model", "m", "--weights", "int4"])
