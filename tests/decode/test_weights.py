"""A rank reads its own slices and holds nothing else: sections, embedding, its share of the head, its caches."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers import weights as weights_module
from stagdist.decode.layers.runner import SectionCache
from stagdist.decode.layers.weights import Device, Shard, StageWeights, WeightLoader, random_reader
from stagdist.decode.runtime.build import DecodePlan, EngineOptions, build_stage, plan_decoding
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.warm_up import Unconnected
from stagdist.decode.topology import HEAD_LAYOUTS, HeadLayout, Limits
from stagdist.errors import ConfigError
from stagdist.parallel.layout import ParameterSpec, model_parameters, stage_parameters
from tests.decode.decoding import CONTEXT, config_of
from tests.reference import stagformer as reference
from tests.reference.variants import VARIANTS

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (4, 1)]
FITTING = [(name, grid) for name, keys in VARIANTS.items() for grid in GRIDS
           if len(keys.get("section_layers", [1, 1])) % grid[0] == 0]  # fmt: skip
BYTES = 8


class Recorder:
    """Gives slices of random parameters and remembers every entry that was read."""

    def __init__(self, model: ModelConfig):
        self.parameters = reference.random_parameters(model, dtype=torch.float64, perturb=True)
        self.counts = {name: torch.zeros_like(value, dtype=torch.int64) for name, value in self.parameters.items()}
        self.nbytes = 0

    def __call__(self, spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
        assert self.parameters[spec.name].shape == spec.shape
        self.counts[spec.name].narrow(dim, start, stop - start).add_(1)
        part = self.parameters[spec.name].narrow(dim, start, stop - start)
        self.nbytes += part.nbytes
        return part


def ranks(plan: DecodePlan) -> Iterator[tuple[int, int]]:
    """(stage, tensor rank) of every rank."""
    for stage in range(plan.grid.pipe):
        for tensor in range(plan.grid.tensor):
            yield stage, tensor


def load(plan: DecodePlan, stage: int, tensor: int) -> tuple[StageWeights, Recorder]:
    """The weights of one rank, and what was read for them."""
    read = Recorder(plan.model)
    shard = Shard(tensor, plan.grid.tensor)
    loader = WeightLoader(plan.model, read, shard, Device("cpu", torch.float64))
    return loader.stage(plan.topology, stage), read


def head_rows(plan: DecodePlan, stage: int, tensor: int) -> range:
    """A rank's part of the vocabulary, written from the rule: equal parts, the last ones may get fewer."""
    parts, sharded = plan.grid.tensor, plan.topology.head == "sharded"
    if not sharded and stage < plan.grid.pipe - 1:
        return range(0)
    own = stage * parts + tensor if sharded else tensor
    parts *= plan.grid.pipe if sharded else 1
    vocabulary = plan.model.vocab_size
    each = -(-vocabulary // parts)
    return range(min(own * each, vocabulary), min((own + 1) * each, vocabulary))


def expected_bytes(plan: DecodePlan, stage: int, tensor: int) -> int:
    """What a rank must hold, from the layout that training uses and its share of the head."""
    model, size = plan.model, plan.grid.tensor
    total = 0
    for spec in stage_parameters(model, plan.grid.pipe, stage):
        if spec.vocabulary or spec.name in ("output_norm.weight", "section_mix"):
            continue
        shape = spec.local_shape(size)
        total += torch.Size(shape).numel()
    if model.combine_sections:
        total += model.num_sections // plan.grid.pipe
    rows = head_rows(plan, stage, tensor)
    has_embedding = model.staggered or stage == 0
    total += model.vocab_size * model.hidden_size * has_embedding
    if plan.topology.head == "sharded" or stage == plan.grid.pipe - 1:
        total += model.hidden_size
        if not (model.tie_word_embeddings and has_embedding):
            total += len(rows) * model.hidden_size
    return total * BYTES


def held_bytes(weights: StageWeights) -> int:
    """Memory behind the weights, each piece once: a tied head is a view of the embedding."""
    return sum({s.data_ptr(): s.nbytes() for s in (each.untyped_storage() for each in weights.tensors())}.values())


@pytest.mark.parametrize("head", HEAD_LAYOUTS)
@pytest.mark.parametrize(("name", "grid"), FITTING)
def test_a_rank_holds_and_reads_its_sections_the_embedding_and_its_share_of_the_head(
    name: str, grid: tuple[int, int], head: HeadLayout
) -> None:
    model = ModelConfig(**config_of(VARIANTS[name]))
    plan = plan_decoding(model, EngineOptions(grid[1], head, precision="fp64"), grid[0] * grid[1])
    # Each section's scalar of the mix keeps the p values alive that were read with it.
    mix_bytes = model.num_sections**2 * BYTES if model.combine_sections else 0
    read_somewhere = Counter[str]()
    for stage, tensor in ranks(plan):
        weights, read = load(plan, stage, tensor)
        expected = expected_bytes(plan, stage, tensor)
        assert expected <= held_bytes(weights) <= expected + mix_bytes
        assert read.nbytes <= expected + mix_bytes, "more was read than is held"
        for entry, count in read.counts.items():
            assert entry == "section_mix" or count.max() <= 1, f"{entry} was read twice"
        assert len(head_rows(plan, stage, tensor)) == (0 if weights.head is None else len(weights.head))
        read_somewhere.update({entry: int(count.bool().sum()) for entry, count in read.counts.items()})
    assert set(read_somewhere) == {spec.name for spec in model_parameters(model)}
    for spec in model_parameters(model):
        assert read_somewhere[spec.name] >= spec.numel, f"a part of {spec.name} is on no rank"


def test_a_rank_reads_nothing_of_other_sections() -> None:
    model = ModelConfig(**config_of(VARIANTS["four sections"]))
    plan = plan_decoding(model, EngineOptions(), 4)
    for stage in range(4):
        _, read = load(plan, stage, 0)
        touched = {name.split(".")[1] for name, count in read.counts.items() if "sections." in name and count.any()}
        assert touched == {str(stage)}


def test_the_accounting_notices_a_whole_matrix_where_a_slice_would_do() -> None:
    model = ModelConfig(**config_of({}))
    plan = plan_decoding(model, EngineOptions(2, precision="fp64"), 2)
    whole = plan_decoding(model, EngineOptions(1, precision="fp64"), 1)
    weights, read = load(whole, 0, 0)
    assert held_bytes(weights) > expected_bytes(plan, 0, 0)
    assert read.nbytes > expected_bytes(plan, 0, 0)


def built(plan: DecodePlan, stage: int, tensor: int) -> Stage:
    """The stage of a rank with its caches."""
    alone = None if plan.grid.world_size == 1 else Unconnected(plan.grid, stage, tensor)
    return build_stage(plan, Recorder(plan.model), "cpu", alone)


@pytest.mark.parametrize(("name", "grid"), FITTING)
def test_caches_hold_own_sections_and_heads_and_of_a_memory_only_the_window(name: str, grid: tuple[int, int]) -> None:
    model = ModelConfig(**config_of(VARIANTS[name]))
    slots, context = 3, 20
    options = EngineOptions(grid[1], precision="fp64", num_slots=slots, max_context=context)
    plan = plan_decoding(model, options, grid[0] * grid[1])
    per_head = 2 * slots * model.head_width * BYTES // grid[1]
    for stage, tensor in ranks(plan):
        expected = 0
        for section in plan.topology.sections(stage):
            layers = model.section_layers[section]
            expected += layers * per_head * model.key_value_heads * (context + 1)
            if model.staggered and section > 0:
                entries = 1 + min(model.cross_attention_window or context, context)
                expected += layers * per_head * model.cross_key_value_heads * entries
        assert built(plan, stage, tensor).kv_bytes == expected


def test_the_cache_of_a_window_does_not_grow_with_the_context() -> None:
    model = ModelConfig(**config_of({"cross_attention_window": 3, "section_layers": [2, 2]}))
    sizes = []
    for capacity in (4, CONTEXT):
        cache = SectionCache(model, 1, Limits(1, capacity, 8), 1, Device("cpu", torch.float64))
        assert cache.memory_kv is not None
        sizes.append(cache.memory_kv.nbytes)
    assert sizes[0] == sizes[1] == 2 * 2 * model.cross_key_value_heads * (3 + 1) * model.head_width * BYTES


REFUSED: dict[str, tuple[dict[str, Any], EngineOptions, int, str]] = {
    "sections on stages": ({"section_layers": [1, 1, 1]}, EngineOptions(), 2, "2 stages cannot hold 3 sections"),
    "processes and tensor ranks": ({}, EngineOptions(2), 3, "3 processes cannot be split into tensor groups of 2"),
    "heads": (
        {"num_key_value_heads": 1},
        EngineOptions(2),
        2,
        "num_key_value_heads 1 is not a multiple of --tensor-parallel-size 2",
    ),
    "inner width": ({"intermediate_size": 25}, EngineOptions(2), 2, "intermediate_size 25"),
    "context": ({}, EngineOptions(max_context=CONTEXT + 1), 1, f"has positions up to {CONTEXT}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_built(name: str) -> None:
    keys, options, world, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=reason):
        plan_decoding(ModelConfig(**config_of(keys)), options, world)


@pytest.mark.parametrize(
    "values",
    [{"tensor_parallel_size": 0}, {"num_slots": 0}, {"chunk_size": -1}, {"timeout_s": 0.0}, {"precision": "fp8"}],
    ids=str,
)
def test_options_that_cannot_work_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        EngineOptions(**values)


def test_random_weights_do_not_depend_on_the_bounds_of_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "READ_BYTES", 10 * 8 * 4)
    spec = next(spec for spec in model_parameters(ModelConfig(**config_of({}))) if spec.name == "embedding.weight")
    read = random_reader(3)
    rows, columns = spec.shape
    complete = read(spec, 0, 0, rows)
    for start, stop in ((0, 1), (9, 11), (10, 20), (rows - 1, rows), (7, rows)):
        assert torch.equal(read(spec, 0, start, stop), complete[start:stop])
    assert torch.equal(read(spec, 1, 3, columns), complete[:, 3:])
    assert complete.std() > 0 and not torch.equal(complete[:10], complete[10:20])
