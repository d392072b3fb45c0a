"""The model as DeepSpeed's pipeline module: `[tied embedding, section]` for every section, then the head.

The list of specs is the same for every number of stages, so a layer has one index on every grid. Between stages
travels a tuple `(float memory, int64 tokens)`, the float first; a sequential model sends its hidden states alone.
With combined sections, memory and accumulator travel stacked in one tensor.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.model.cross_entropy import token_nats
from stagdist.model.head import Head
from stagdist.model.megatron import TensorParallel
from stagdist.model.section import Section, layer_cores
from stagdist.model.stagformer import head_canonical_name, new_embedding, section_canonical_name
from stagdist.parallel.grid import Grid
from stagdist.training.engine.distributed import topology

Carry = Tensor | tuple[Tensor, Tensor]
"""What one section hands to the next: hidden states, or (hidden states or stack, tokens)."""


@dataclass(frozen=True)
class SectionInput:
    """What a section starts from, inside one stage.

    Attributes:
        carry: float tensor handed over by the previous section; None for the first.
        tokens: int64 [B, S], passed on to later sections.
        embedded: [B, S, H] token embeddings.
        shared_core: layers that all sections share, where they do.
    """

    carry: Tensor | None
    tokens: Tensor
    embedded: Tensor
    shared_core: nn.ModuleList | None = None


class EmbeddingLayer(nn.Module):
    """The embedding as a tied pipeline layer.

    Its first use is the module's own call: DeepSpeed saves a tied layer only where it has no forward function.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.embedding = new_embedding(model, parallel)

    def forward(self, tokens: Tensor) -> SectionInput:
        """Begin the first section. Shapes: int64 [B, S]."""
        return SectionInput(None, tokens, self.embedding(tokens))


def embed_again(layer: EmbeddingLayer, carry: tuple[Tensor, Tensor]) -> SectionInput:
    """Begin a later section from the same tokens."""
    memory, tokens = carry
    return SectionInput(memory, tokens, layer.embedding(tokens))


def lend_embedding(layer: EmbeddingLayer, carry: Carry) -> tuple[Carry, Tensor]:
    """Pass the embedding's matrix on to a tied head."""
    return carry, layer.embedding.weight


class SharedCoreLayer(nn.Module):
    """Self-attention and SwiGLU of all sections, as a tied pipeline layer."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.layers = layer_cores(model, 0, parallel)

    def forward(self, section_input: SectionInput) -> SectionInput:
        """Lend the layers to the section that follows."""
        return replace(section_input, shared_core=self.layers)


def lend_core(layer: SharedCoreLayer, section_input: SectionInput) -> SectionInput:
    """The same for a later section."""
    return layer(section_input)


class SectionLayer(nn.Module):
    """A section as a pipeline layer: unpacks what came, packs what goes on."""

    def __init__(self, config: RunConfig, index: int, parallel: TensorParallel):
        super().__init__()
        self.staggered = config.model.staggered
        self.section = Section(
            config.model,
            index,
            parallel,
            own_core=not config.model.share_section_weights,
            checkpoint_layers=config.training.activation_checkpointing == "layer",
        )

    def forward(self, inputs: SectionInput | Tensor) -> Carry:
        """Run the section."""
        if not self.staggered:
            return self.section(inputs.embedded if isinstance(inputs, SectionInput) else inputs)
        assert isinstance(inputs, SectionInput), "a staggered section needs its embedding layer before it"
        previous, accumulator = inputs.carry, None
        if self.section.mix is not None and previous is not None:
            previous, accumulator = previous.unbind(0)  # [2, B, S, H]
        output = self.section(inputs.embedded, previous, inputs.shared_core)
        if self.section.mix is None:
            return output, inputs.tokens
        mixed = self.section.mix * output
        return torch.stack((output, mixed if accumulator is None else accumulator + mixed)), inputs.tokens


class HeadLayer(nn.Module):
    """The head as the last pipeline layer."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.tied, self.combined, self.staggered = model.tie_word_embeddings, model.combine_sections, model.staggered
        self.head = Head(model, parallel)

    def forward(self, inputs: Carry | tuple[Carry, Tensor]) -> Tensor:
        """Logits of this tensor rank, [B, S, V]."""
        carry, weight = inputs if self.tied else (inputs, None)
        hidden_states = carry[0] if self.staggered else carry
        return self.head(hidden_states[1] if self.combined else hidden_states, weight)


def mean_nats(logits: Tensor, labels: Tensor, parallel: TensorParallel) -> Tensor:
    """Loss of a micro-batch: mean cross-entropy per token, nats. Overwrites fp32 `logits`."""
    return token_nats(logits, labels, parallel).mean()


class SectionPipeline(PipelineModule):
    """DeepSpeed's pipeline over the sections of a model, cut at whole sections.

    Args:
        config: the run; model, checkpointing and number of stages are read.
        grid: sizes of the axes.
        parallel: the tensor axis.
    """

    def __init__(self, config: RunConfig, grid: Grid, parallel: TensorParallel):
        self.run_config = config
        specs, self.bounds = _layer_specs(config, grid, parallel)
        super().__init__(layers=specs, topology=topology(grid), loss_fn=partial(mean_nats, parallel=parallel))

    def _partition_layers(self, method: str = "") -> None:
        """Cut at our bounds; DeepSpeed's own methods would cut inside `[embedding, section]`."""
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self.bounds
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of this stage by canonical name; `section_mix` comes as `section_mix.{s}`."""
        return {self._canonical(name): parameter for name, parameter in self.named_parameters()}

    def _canonical(self, name: str) -> str:
        if name.startswith("tied_modules.embedding."):
            return "embedding.weight"
        if name.startswith("tied_modules.core."):
            return section_canonical_name(0, name.replace("tied_modules.core.layers.", "core."), shared=True)
        layer, kind, rest = name.split(".", 2)
        if kind == "head":
            return head_canonical_name(rest)
        section = self.get_submodule(f"{layer}.section").index
        return section_canonical_name(section, rest, shared=self.run_config.model.share_section_weights)


def _layer_specs(config: RunConfig, grid: Grid, parallel: TensorParallel) -> tuple[list[LayerSpec], list[int]]:
    """All layers of the pipeline and the index of each stage's first one, with the end."""
    model = config.model
    specs: list[LayerSpec] = []
    starts: list[int] = []
    for index in range(model.num_sections):
        starts.append(len(specs))
        if index == 0 or model.staggered:
            specs.append(_embedding_spec(model, parallel, None if index == 0 else embed_again))
        if model.share_section_weights:
            specs.append(_core_spec(model, parallel, None if index == 0 else lend_core))
        specs.append(LayerSpec(SectionLayer, config, index, parallel))
    if model.tie_word_embeddings:
        specs.append(_embedding_spec(model, parallel, lend_embedding))
    specs.append(LayerSpec(HeadLayer, model, parallel))
    per_stage = model.num_sections // grid.pipe
    return specs, starts[::per_stage] + [len(specs)]


def _embedding_spec(model: ModelConfig, parallel: TensorParallel, forward_fn: object) -> TiedLayerSpec:
    return TiedLayerSpec(
        "embedding", EmbeddingLayer, model, parallel, forward_fn=forward_fn, tied_weight_attr=["embedding.weight"]
    )


def _core_spec(model: ModelConfig, parallel: TensorParallel, forward_fn: object) -> TiedLayerSpec:
    with torch.device("meta"):
        names = [f"layers.{name}" for name, _ in layer_cores(model, 0, parallel).named_parameters()]
    return TiedLayerSpec("core", SharedCoreLayer, model, parallel, forward_fn=forward_fn, tied_weight_attr=names)
