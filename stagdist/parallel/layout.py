"""Every parameter of a model by its canonical name, and which stage holds it. Pure, no torch.

This table is the only source for parameter counts, initialization, sharding, checkpoints and exports.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from stagdist.config.parts import ModelConfig


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the model.

    Attributes:
        name: canonical name, as in a model directory.
        shape: global shape; the vocabulary is not padded.
        shard_dim: dimension that tensor parallelism splits; None when replicated.
        std: standard deviation of the initial normal values; None for a constant.
        fill: the constant, where `std` is None.
        vocabulary: True where dimension 0 counts tokens (padded to the tensor size inside the runtime).
    """

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None = None
    std: float | None = None
    fill: float = 0.0
    vocabulary: bool = False

    @property
    def decays(self) -> bool:
        """Weight decay applies to every matrix and no vector."""
        return len(self.shape) > 1

    @property
    def numel(self) -> int:
        """Number of values of the global parameter, unpadded."""
        return prod(self.shape)

    def local_shape(self, tensor_size: int) -> tuple[int, ...]:
        """Shape on one rank of a tensor-parallel group, padding included."""
        if self.shard_dim is None:
            return self.shape
        shape = list(self.shape)
        size = padded_vocab_size(shape[0], tensor_size) if self.vocabulary else shape[self.shard_dim]
        shape[self.shard_dim] = size // tensor_size
        return tuple(shape)


def padded_vocab_size(vocab_size: int, tensor_size: int) -> int:
    """Vocabulary rounded up to a multiple of the tensor size."""
    return -(-vocab_size // tensor_size) * tensor_size


def model_parameters(model: ModelConfig) -> list[ParameterSpec]:
    """Every parameter of the model once, in the order of the computation."""
    specs = [embedding_parameter(model)]
    for section in range(model.num_sections):
        specs += section_parameters(model, section)
    if model.combine_sections:
        specs.append(ParameterSpec("section_mix", (model.num_sections,), fill=1.0 / model.num_sections))
    return specs + head_parameters(model)


def embedding_parameter(model: ModelConfig) -> ParameterSpec:
    """The token embedding, `embedding.weight` [vocab, hidden]."""
    shape = (model.vocab_size, model.hidden_size)
    return ParameterSpec("embedding.weight", shape, shard_dim=0, std=model.hidden_size**-0.5, vocabulary=True)


def head_parameters(model: ModelConfig) -> list[ParameterSpec]:
    """The final norm, and the matrix of the head unless it is tied."""
    specs = [ParameterSpec("output_norm.weight", (model.hidden_size,), fill=1.0)]
    if not model.tie_word_embeddings:
        shape = (model.vocab_size, model.hidden_size)
        specs.append(ParameterSpec("head.weight", shape, shard_dim=0, std=model.hidden_size**-0.5, vocabulary=True))
    return specs


def section_parameters(model: ModelConfig, section: int) -> list[ParameterSpec]:
    """Parameters that belong to one section alone; with shared weights section 0 lists the shared ones."""
    prefix = f"sections.{section}."
    own_core = section == 0 or not model.share_section_weights
    has_cross = model.staggered and section > 0
    specs: list[ParameterSpec] = []
    for layer in range(model.section_layers[section]):
        name = f"{prefix}layers.{layer}."
        if own_core:
            specs += _norm(model, name + "self_attention_norm.weight")
            specs += _attention(model, name + "self_attention.", model.key_value_heads)
        if has_cross:
            specs += _norm(model, name + "cross_attention_norm.weight")
            specs += _attention(model, name + "cross_attention.", model.cross_key_value_heads)
        if own_core:
            specs += _norm(model, name + "mlp_norm.weight")
            specs += _mlp(model, name + "mlp.")
    if has_cross:
        specs += _norm(model, prefix + "memory_norm.weight")
        if model.stagger > 0:
            specs.append(ParameterSpec(prefix + "null_memory", (model.hidden_size,)))
    return specs


def _norm(model: ModelConfig, name: str) -> list[ParameterSpec]:
    return [ParameterSpec(name, (model.hidden_size,), fill=1.0)]


def _residual_std(model: ModelConfig) -> float:
    return model.hidden_size**-0.5 / (2 * model.num_layers) ** 0.5


def _attention(model: ModelConfig, prefix: str, key_value_heads: int) -> list[ParameterSpec]:
    hidden, std = model.hidden_size, model.hidden_size**-0.5
    query, key_value = model.num_attention_heads * model.head_width, key_value_heads * model.head_width
    return [
        ParameterSpec(prefix + "q_proj.weight", (query, hidden), 0, std),
        ParameterSpec(prefix + "k_proj.weight", (key_value, hidden), 0, std),
        ParameterSpec(prefix + "v_proj.weight", (key_value, hidden), 0, std),
        ParameterSpec(prefix + "o_proj.weight", (hidden, query), 1, _residual_std(model)),
    ]


def _mlp(model: ModelConfig, prefix: str) -> list[ParameterSpec]:
    hidden, inner, std = model.hidden_size, model.intermediate_size, model.hidden_size**-0.5
    return [
        ParameterSpec(prefix + "gate_proj.weight", (inner, hidden), 0, std),
        ParameterSpec(prefix + "up_proj.weight", (inner, hidden), 0, std),
        ParameterSpec(prefix + "down_proj.weight", (hidden, inner), 1, _residual_std(model)),
    ]


@dataclass(frozen=True)
class StageLayout:
    """What one pipeline stage holds.

    Attributes:
        sections: indices of its sections.
        embedding: it needs the token embedding for the input of its sections.
        shared_core: it needs the weights that all sections share.
        head: it ends with the final norm and the head.
        tied_head: its head reads the embedding's matrix.
    """

    sections: range
    embedding: bool
    shared_core: bool
    head: bool
    tied_head: bool

    @property
    def holds_embedding(self) -> bool:
        """The embedding's matrix is on this stage, for input, head or both."""
        return self.embedding or self.tied_head


def stage_layout(model: ModelConfig, pipe_size: int, stage: int) -> StageLayout:
    """What stage `stage` of `pipe_size` holds; `pipe_size` divides the number of sections."""
    per_stage = model.num_sections // pipe_size
    sections = range(stage * per_stage, (stage + 1) * per_stage)
    last = stage == pipe_size - 1
    return StageLayout(
        sections=sections,
        embedding=stage == 0 or model.staggered,
        shared_core=model.share_section_weights,
        head=last,
        tied_head=last and model.tie_word_embeddings,
    )


def owning_stage(name: str, model: ModelConfig, pipe_size: int) -> int:
    """The first stage that holds a parameter; `section_mix` is given as `section_mix.{s}`."""
    if name == "embedding.weight":
        return 0
    kind, _, rest = name.partition(".")
    if kind in ("sections", "section_mix"):
        return int(rest.split(".")[0]) // (model.num_sections // pipe_size)
    return pipe_size - 1


def stage_parameters(model: ModelConfig, pipe_size: int, stage: int) -> Iterator[ParameterSpec]:
    """Parameters of a stage, including copies of tied and shared ones.

    Of `section_mix` a stage holds one value for each of its sections.
    """
    layout = stage_layout(model, pipe_size, stage)
    if layout.holds_embedding:
        yield embedding_parameter(model)
    if layout.shared_core and layout.sections.start > 0:
        yield from section_parameters(model, 0)
    for section in layout.sections:
        yield from section_parameters(model, section)
    if model.combine_sections:
        yield ParameterSpec("section_mix", (len(layout.sections),), fill=1.0 / model.num_sections)
    if layout.head:
        yield from head_parameters(model)


def micro_batches_in_flight(pipe_size: int, stage: int, num_micro_batches: int) -> int:
    """Maximum number of micro-batches in an optimizer step that have run forward but not backward on a stage.

    In eager 1F1B every stage is two micro-batches ahead of the next one, so that results arrive before they are needed.
    Plain 1F1B is one ahead: it holds fewer activations, but waits for every transfer.
    """
    return min(2 * (pipe_size - stage) - 1, num_micro_batches)
