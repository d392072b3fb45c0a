"""The model as DeepSpeed's pipeline module: `[tied embedding, section]` for every section, then the head.

The list of specs is the same for every number of stages, so a layer has one index on every grid. Layers of a stage
pass each other `HandOff` and `SectionInput`. DeepSpeed passes tensors and tuples between stages;
`SectionPipeline.forward` and the engine's send and receive instructions convert them.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from stagdist.config.parts import ModelConfig
from stagdist.model.cross_entropy import token_nats
from stagdist.model.head import Head
from stagdist.model.megatron import TensorParallel
from stagdist.model.section import Section, layer_cores
from stagdist.model.stagformer import head_canonical_name, new_embedding, section_canonical_name
from stagdist.parallel.grid import Grid
from stagdist.training.engine.deepspeed_adapter import CutPipeline
from stagdist.training.engine.distributed import topology


@dataclass(frozen=True)
class HandOff:
    """What one section hands to the next, on the same stage or another.

    Attributes:
        memory: [B, S, H] output of the section; with combined sections [2, B, S, H], output and accumulator.
        input_ids: int64 [B, S]; None in a sequential model, where later sections do not read them.
    """

    memory: Tensor
    input_ids: Tensor | None = None

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The tensors that travel between stages, the float one first; `HandOff(*tensors)` is the inverse."""
        return (self.memory,) if self.input_ids is None else (self.memory, self.input_ids)


def expected_hand_off(model: ModelConfig, micro_batch_size: int, sequence_length: int, dtype: torch.dtype) -> HandOff:
    """Shapes and dtypes of what a stage hands to the next, as tensors without memory (device `meta`)."""
    batch = (micro_batch_size, sequence_length)
    stack = (2,) if model.combine_sections else ()
    memory = torch.empty((*stack, *batch, model.hidden_size), dtype=dtype, device="meta")
    return HandOff(memory, torch.empty(batch, dtype=torch.int64, device="meta") if model.staggered else None)


@dataclass(frozen=True)
class SectionInput:
    """What the layers before a section prepare for it.

    Attributes:
        memory: of the previous section's `HandOff`; None for the first section.
        input_ids: int64 [B, S], passed on to later sections.
        embedded: [B, S, H] token embeddings.
        shared_core: layers that all sections share, where they do.
    """

    memory: Tensor | None
    input_ids: Tensor
    embedded: Tensor
    shared_core: nn.ModuleList | None = None


class EmbeddingLayer(nn.Module):
    """The embedding as a tied pipeline layer.

    Its first use is the module's own call: DeepSpeed saves a tied layer only where it has no forward function.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.embedding = new_embedding(model, parallel)

    def forward(self, input_ids: Tensor) -> SectionInput:
        """Begin the first section. Shapes: int64 [B, S]."""
        return SectionInput(None, input_ids, self.embedding(input_ids))


def embed_again(layer: EmbeddingLayer, previous: HandOff) -> SectionInput:
    """Begin a later section from the same tokens."""
    assert previous.input_ids is not None, "a staggered section hands on its tokens"
    return SectionInput(previous.memory, previous.input_ids, layer.embedding(previous.input_ids))


def lend_embedding(layer: EmbeddingLayer, previous: HandOff) -> tuple[HandOff, Tensor]:
    """Pass the embedding's matrix on to a tied head."""
    return previous, layer.embedding.weight


class SharedCoreLayer(nn.Module):
    """Self-attention and SwiGLU of all sections, as a tied pipeline layer."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.layers = layer_cores(model, 0, parallel)

    def forward(self, section_input: SectionInput) -> SectionInput:
        """Lend the layers to the section that follows."""
        return replace(section_input, shared_core=self.layers)


class SectionLayer(nn.Module):
    """A section as a pipeline layer.

    Args:
        index: which section, from 0.
        checkpoint_layers: recompute each layer in the backward pass.
    """

    def __init__(self, model: ModelConfig, index: int, parallel: TensorParallel, *, checkpoint_layers: bool = False):
        super().__init__()
        self.staggered = model.staggered
        own_core = not model.share_section_weights
        self.section = Section(model, index, parallel, own_core=own_core, checkpoint_layers=checkpoint_layers)

    def forward(self, inputs: SectionInput | HandOff) -> HandOff:
        """Run the section. A sequential one starts from the previous section's output, a staggered one from tokens."""
        if not self.staggered:
            return HandOff(self.section(inputs.embedded if isinstance(inputs, SectionInput) else inputs.memory))
        assert isinstance(inputs, SectionInput), "a staggered section needs its embedding layer before it"
        previous, accumulator = inputs.memory, None
        if self.section.mix is not None and previous is not None:
            previous, accumulator = previous.unbind(0)  # [2, B, S, H]
        output = self.section(inputs.embedded, previous, inputs.shared_core)
        if self.section.mix is None:
            return HandOff(output, inputs.input_ids)
        mixed = self.section.mix * output
        return HandOff(torch.stack((output, mixed if accumulator is None else accumulator + mixed)), inputs.input_ids)


class HeadLayer(nn.Module):
    """The head as the last pipeline layer."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.combined = model.combine_sections
        self.head = Head(model, parallel)

    def forward(self, inputs: HandOff | tuple[HandOff, Tensor]) -> Tensor:
        """Logits of this tensor rank, [B, S, V]; a tied head gets the embedding's matrix as well."""
        previous, weight = inputs if isinstance(inputs, tuple) else (inputs, None)
        return self.head(previous.memory[1] if self.combined else previous.memory, weight)


def mean_nats(logits: Tensor, labels: Tensor, parallel: TensorParallel) -> Tensor:
    """Loss of a micro-batch: mean cross-entropy per token, nats. Overwrites fp32 `logits`."""
    return token_nats(logits, labels, parallel).mean()


class SectionPipeline(CutPipeline):
    """DeepSpeed's pipeline over the sections of a model, cut between sections."""

    def __init__(self, model: ModelConfig, activation_checkpointing: str, grid: Grid, parallel: TensorParallel):
        self._share_section_weights = model.share_section_weights
        specs, bounds = _layer_specs(model, activation_checkpointing == "layer", grid.pipe, parallel)
        super().__init__(specs, bounds, topology(grid), partial(mean_nats, parallel=parallel))

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Run this stage.

        It takes token ids on the first stage and returns logits on the last one. In between are hand-offs as tuples.
        """
        outputs = super().forward(HandOff(*inputs) if isinstance(inputs, tuple) else inputs)
        return outputs.to_tuple() if isinstance(outputs, HandOff) else outputs

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
        return section_canonical_name(section, rest, shared=self._share_section_weights)


def _layer_specs(
    model: ModelConfig, checkpoint_layers: bool, num_stages: int, parallel: TensorParallel
) -> tuple[list[LayerSpec], list[int]]:
    """All layers of the pipeline and the index of each stage's first one, with the end."""
    specs: list[LayerSpec] = []
    starts: list[int] = []
    for index in range(model.num_sections):
        starts.append(len(specs))
        if index == 0 or model.staggered:
            specs.append(_embedding_spec(model, parallel, None if index == 0 else embed_again))
        if model.share_section_weights:
            specs.append(_core_spec(model, parallel, None if index == 0 else SharedCoreLayer.forward))
        specs.append(LayerSpec(SectionLayer, model, index, parallel, checkpoint_layers=checkpoint_layers))
    if model.tie_word_embeddings:
        specs.append(_embedding_spec(model, parallel, lend_embedding))
    specs.append(LayerSpec(HeadLayer, model, parallel))
    return specs, starts[:: model.num_sections // num_stages] + [len(specs)]


def _embedding_spec(model: ModelConfig, parallel: TensorParallel, forward_fn: object) -> TiedLayerSpec:
    return TiedLayerSpec(
        "embedding", EmbeddingLayer, model, parallel, forward_fn=forward_fn, tied_weight_attr=["embedding.weight"]
    )


def _core_spec(model: ModelConfig, parallel: TensorParallel, forward_fn: object) -> TiedLayerSpec:
    with torch.device("meta"):
        names = [f"layers.{name}" for name, _ in layer_cores(model, 0, parallel).named_parameters()]
    return TiedLayerSpec("core", SharedCoreLayer, model, parallel, forward_fn=forward_fn, tied_weight_attr=names)
