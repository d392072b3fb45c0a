"""Files, layers and flat optimizer partitions of a DeepSpeed checkpoint on a grid. Imports no torch.

Files of a training checkpoint for pipe x data x tensor:

    layer_LL-model_TT-model_states.pt                  weights of pipeline layer LL, tensor rank TT
    mp_rank_RR_model_states.pt                         counters and generators; RR = stage * tensor + TT
    [bf16_]zero_pp_rank_D_mp_rank_RR_optim_states.pt   fp32 masters and Adam moments of data rank D

Optimizer values are flat: the local parameters of a group (matrices, then vectors) are concatenated in the order of the
modules, padded, and cut into equal partitions, one for each data rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from stagdist.config.parts import ModelConfig
from stagdist.parallel.layout import (
    ParameterSpec,
    embedding_parameter,
    head_parameters,
    model_parameters,
    section_parameters,
)

ALIGNMENT = 2
"""Flat groups are padded to a multiple of this many values for each data rank."""

_PROJECTIONS = ("_proj.weight", "projection.weight")
_TIED = ("embedding", "core")


@dataclass(frozen=True)
class PipelineLayer:
    """One entry of the list of pipeline layers, which is the same on every grid.

    Attributes:
        index: position in the list.
        kind: `embedding`, `core` (shared self-attention and MLP), `section` or `head`.
        section: its section; the last section for the head.
        first: True for the first use of a tied layer, the only one that is stored, and for layers that are not tied.
    """

    index: int
    kind: str
    section: int
    first: bool = True

    def file(self, tensor_rank: int) -> str:
        """Name of its weights file."""
        return f"layer_{self.index:02d}-model_{tensor_rank:02d}-model_states.pt"


@dataclass(frozen=True)
class StoredParameter:
    """One parameter of a stage.

    Attributes:
        spec: its name and shape; `section_mix` is stored as one entry per section, `section_mix.{s}`.
        layer: pipeline layer whose file stores it.
        key: its name in that file.
        name: its name in DeepSpeed.
    """

    spec: ParameterSpec
    layer: PipelineLayer
    key: str
    name: str


@dataclass(frozen=True)
class PartitionPiece:
    """Part of a local parameter in one data rank's flat partition.

    Attributes:
        data_rank: owner of the partition.
        start: first value inside the partition.
        offset: first value inside the flattened local parameter.
        length: number of values.
    """

    data_rank: int
    start: int
    offset: int
    length: int


def pipeline_layers(model: ModelConfig) -> list[PipelineLayer]:
    """All layers of the pipeline in order."""
    kinds: list[tuple[str, int]] = []
    for section in range(model.num_sections):
        if section == 0 or model.staggered:
            kinds.append(("embedding", section))
        if model.share_section_weights:
            kinds.append(("core", section))
        kinds.append(("section", section))
    last = model.num_sections - 1
    if model.tie_word_embeddings:
        kinds.append(("embedding", last))
    kinds.append(("head", last))
    seen: set[str] = set()
    layers = []
    for index, (kind, section) in enumerate(kinds):
        layers.append(PipelineLayer(index, kind, section, first=kind not in _TIED or kind not in seen))
        seen.add(kind)
    return layers


def layer_parameters(model: ModelConfig, layer: PipelineLayer) -> list[StoredParameter]:
    """Parameters of a layer in the order of its modules."""
    if layer.kind == "embedding":
        spec = embedding_parameter(model)
        return [StoredParameter(spec, layer, spec.name, f"tied_modules.embedding.{spec.name}")]
    if layer.kind == "head":
        keys = {"output_norm.weight": "head.norm.weight", "head.weight": "head.projection.weight"}
        specs = head_parameters(model)
        return [StoredParameter(spec, layer, keys[spec.name], f"{layer.index}.{keys[spec.name]}") for spec in specs]
    if layer.kind == "core":
        prefix = "sections.0."
        specs = [spec for spec in section_parameters(model, 0) if spec.name.startswith(prefix + "layers.")]
        keys = {spec.name: spec.name.removeprefix(prefix) for spec in specs}
        return [StoredParameter(spec, layer, keys[spec.name], f"tied_modules.core.{keys[spec.name]}") for spec in specs]
    return [
        StoredParameter(spec, layer, f"section.{key}", f"{layer.index}.section.{key}")
        for key, spec in _section_modules(model, layer.section)
    ]


def _section_modules(model: ModelConfig, section: int) -> Iterator[tuple[str, ParameterSpec]]:
    """Names and parameters of the module of a section, in its order."""
    prefix = f"sections.{section}."
    local = [(spec.name.removeprefix(prefix), spec) for spec in section_parameters(model, section)]
    yield from ((name, spec) for name, spec in local if name == "null_memory")
    if model.combine_sections:
        yield "mix", mix_part(model, section)
    layered = [(name.removeprefix("layers."), spec) for name, spec in local if name.startswith("layers.")]
    if not model.share_section_weights:
        yield from ((f"core.{name}", spec) for name, spec in layered if ".cross_attention" not in name)
    yield from ((f"cross.{name}", spec) for name, spec in layered if ".cross_attention" in name)
    yield from ((name, spec) for name, spec in local if name == "memory_norm.weight")


def mix_part(model: ModelConfig, section: int) -> ParameterSpec:
    """The part of `section_mix` that belongs to a section."""
    return ParameterSpec(f"section_mix.{section}", (1,), fill=1.0 / model.num_sections)


def stored_specs(model: ModelConfig) -> list[ParameterSpec]:
    """Every stored parameter once, with `section_mix` in parts."""
    specs = []
    for spec in model_parameters(model):
        parts = [mix_part(model, section) for section in range(model.num_sections)]
        specs += parts if spec.name == "section_mix" else [spec]
    return specs


def extra_keys(model: ModelConfig, layer: PipelineLayer) -> list[str]:
    """Keys of the file of a layer. Projections of megatron-core have an empty extra state after the weight."""
    keys = []
    for stored in layer_parameters(model, layer):
        keys.append(stored.key)
        if stored.key.endswith(_PROJECTIONS):
            keys.append(stored.key.removesuffix("weight") + "_extra_state")
    if layer.kind == "head" and model.tie_word_embeddings:
        keys.append("head.projection._extra_state")
    return keys


def stage_layers(model: ModelConfig, pipe_size: int, stage: int) -> list[PipelineLayer]:
    """Layers of one stage."""
    per_stage = model.num_sections // pipe_size
    return [layer for layer in pipeline_layers(model) if layer.section // per_stage == stage]


def stage_order(model: ModelConfig, pipe_size: int, stage: int) -> list[StoredParameter]:
    """Parameters of one stage in the order of DeepSpeed: tied parameters first, including copies.

    `layer` of a tied parameter is the layer that stores it, on any stage.
    """
    stores = {layer.kind: layer for layer in pipeline_layers(model) if layer.first and layer.kind in _TIED}
    layers = stage_layers(model, pipe_size, stage)
    tied = dict.fromkeys(layer.kind for layer in layers if layer.kind in _TIED)
    found = [stored for kind in tied for stored in layer_parameters(model, stores[kind])]
    for layer in layers:
        found += layer_parameters(model, layer) if layer.kind not in _TIED else []
    return found


@dataclass(frozen=True)
class FlatGroup:
    """One flat optimizer group of a stage.

    Attributes:
        parameters: in order.
        tensor_size: ranks that split the matrices.
        data_size: number of partitions.
    """

    parameters: tuple[StoredParameter, ...]
    tensor_size: int
    data_size: int

    def local_size(self, stored: StoredParameter) -> int:
        """Values of a parameter on one rank, including the padding of the vocabulary."""
        return prod(stored.spec.local_shape(self.tensor_size))

    @property
    def size(self) -> int:
        """Values of all parameters."""
        return sum(self.local_size(stored) for stored in self.parameters)

    @property
    def partition_size(self) -> int:
        """Values of one partition, including padding."""
        unit = ALIGNMENT * self.data_size
        return -(-self.size // unit) * ALIGNMENT

    def padding(self, data_rank: int) -> int:
        """Padding values at the end of a partition."""
        return min(max((data_rank + 1) * self.partition_size - self.size, 0), self.partition_size)

    def pieces(self) -> Iterator[tuple[StoredParameter, list[PartitionPiece]]]:
        """Every parameter with its pieces in the partitions."""
        begin = 0
        for stored in self.parameters:
            end = begin + self.local_size(stored)
            yield stored, list(self._cut(begin, end))
            begin = end

    def _cut(self, begin: int, end: int) -> Iterator[PartitionPiece]:
        position = begin
        while position < end:
            data_rank, start = divmod(position, self.partition_size)
            length = min(end - position, self.partition_size - start)
            yield PartitionPiece(data_rank, start, position - begin, length)
            position += length


def flat_groups(model: ModelConfig, sizes: tuple[int, int, int], stage: int) -> tuple[FlatGroup, FlatGroup]:
    """The two groups of a stage, matrices with weight decay and vectors, on a grid of (pipe, data, tensor) sizes."""
    order = stage_order(model, sizes[0], stage)
    matrices = tuple(one for one in order if one.spec.decays)
    vectors = tuple(one for one in order if not one.spec.decays)
    return FlatGroup(matrices, sizes[2], sizes[1]), FlatGroup(vectors, sizes[2], sizes[1])


def model_states_file(stage: int, tensor_rank: int, tensor_size: int) -> str:
    """Name of the file with counters and generators."""
    return f"mp_rank_{stage * tensor_size + tensor_rank:02d}_model_states.pt"


def optimizer_file(stage: int, data_rank: int, tensor_rank: int, tensor_size: int, *, bf16: bool) -> str:
    """Name of the file with the partitions of one rank."""
    prefix = "bf16_" if bf16 else ""
    return f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{stage * tensor_size + tensor_rank:02d}_optim_states.pt"


def tensor_files(model: ModelConfig, sizes: tuple[int, int, int], *, bf16: bool) -> list[str]:
    """Names of all DeepSpeed files of a checkpoint."""
    pipe, data, tensor = sizes
    stored = [layer for layer in pipeline_layers(model) if layer.first]
    names = [layer.file(rank) for layer in stored for rank in range(tensor)]
    for stage in range(pipe):
        for rank in range(tensor):
            names.append(model_states_file(stage, rank, tensor))
            names += [optimizer_file(stage, replica, rank, tensor, bf16=bf16) for replica in range(data)]
    return names
