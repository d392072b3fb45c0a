"""The full model in one module, and the mapping from module names to canonical names."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stagdist.config.parts import ModelConfig
from stagdist.model.head import Head
from stagdist.model.initialization import initial_value, local_slice
from stagdist.model.megatron import TensorParallel, TokenEmbedding
from stagdist.model.section import Section
from stagdist.parallel.layout import ParameterSpec, model_parameters, padded_vocab_size


def new_embedding(model: ModelConfig, parallel: TensorParallel) -> TokenEmbedding:
    """The token embedding on the padded vocabulary."""
    return TokenEmbedding(padded_vocab_size(model.vocab_size, parallel.size), model.hidden_size, parallel)


def section_canonical_name(section: int, name: str, *, shared: bool) -> str:
    """Canonical name of a parameter that a `Section` calls `name`; with shared weights cores belong to section 0."""
    if name == "mix":
        return f"section_mix.{section}"
    core = re.sub(r"^(core|cross)\.", "layers.", name)
    owner = 0 if shared and name.startswith("core.") else section
    return f"sections.{owner}.{core}"


def head_canonical_name(name: str) -> str:
    """Canonical name of a parameter that `Head` calls `name`."""
    return {"norm.weight": "output_norm.weight", "projection.weight": "head.weight"}[name]


class StagFormer(nn.Module):
    """All sections, embedding and head in one process per tensor rank.

    Shapes: input_ids int64 [B, S] -> logits [B, S, V], V of this tensor rank.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.config = model
        self.parallel = parallel
        self.embedding = new_embedding(model, parallel)
        self.sections = nn.ModuleList(
            Section(model, index, parallel, own_core=index == 0 or not model.share_section_weights)
            for index in range(model.num_sections)
        )
        self.head = Head(model, parallel)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every position."""
        embedded = self.embedding(input_ids)
        shared_core = self.sections[0].core if self.config.share_section_weights else None
        output: Tensor | None = None
        combined: Tensor | None = None
        for section in self.sections:
            assert isinstance(section, Section)
            start = embedded if self.config.staggered or output is None else output
            output = section(start, output, shared_core)
            if section.mix is not None:
                combined = section.mix * output if combined is None else combined + section.mix * output
        tied = self.embedding.weight if self.config.tie_word_embeddings else None
        return self.head(output if combined is None else combined, tied)

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by canonical name; `section_mix` comes as one entry per section, `section_mix.{s}`."""
        named: dict[str, nn.Parameter] = {"embedding.weight": self.embedding.weight}
        for index, section in enumerate(self.sections):
            for name, parameter in section.named_parameters():
                canonical = section_canonical_name(index, name, shared=self.config.share_section_weights)
                named[canonical] = parameter
        named |= {head_canonical_name(name): parameter for name, parameter in self.head.named_parameters()}
        return named


def fill_parameters(named: dict[str, nn.Parameter], model: ModelConfig, parallel: TensorParallel, seed: int) -> None:
    """Set parameters, by canonical name, to their initial values."""
    specs = {spec.name: spec for spec in model_parameters(model)}
    for name, parameter in named.items():
        value = canonical_slice(specs, name, lambda spec: initial_value(spec, seed), parallel)
        with torch.no_grad():
            parameter.copy_(value)


def canonical_slice(
    specs: dict[str, ParameterSpec],
    name: str,
    global_tensor: Callable[[ParameterSpec], Tensor],
    parallel: TensorParallel,
) -> Tensor:
    """This rank's part of the parameter `name`; `global_tensor(spec)` returns the full parameter."""
    if name.startswith("section_mix."):
        return global_tensor(specs["section_mix"])[int(name.rsplit(".", 1)[1])].reshape(1)
    spec = specs[name]
    return local_slice(global_tensor(spec), spec, parallel.rank, parallel.size)
