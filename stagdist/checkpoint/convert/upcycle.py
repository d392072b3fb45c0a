"""Cut a Llama into the sections of a StagFormer, as a starting point for training.

The second and later sections of a StagFormer start from the embeddings instead of the output of the layers before
them, and read that output through cross-attention, which a Llama does not have. The initial values are:

- embedding, head, norms, self-attention and SwiGLU: the Llama's, layer by layer;
- cross-attention and its norm: a copy of the same layer's self-attention and its norm, because the memory is the stream
  that this self-attention was trained to read; its output projection is scaled by `output_scale`;
- norm of the memory: that of the first self-attention of the section, whose input the memory was;
- the null vector: zero.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stagdist.checkpoint.convert.find import open_weights
from stagdist.checkpoint.convert.model_conversions import NewModel, write_model
from stagdist.checkpoint.convert.staging import ConversionOptions, ConversionResult, require_free
from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.checkpoint.weight_source import WeightSource, require_finite
from stagdist.config.loading import validate_model
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError, ConfigError
from stagdist.parallel.layout import ParameterSpec, model_parameters

OUTPUT_SCALE = 0.0
"""Default scale of the output projection of cross-attention; measurements are in docs/checkpoints.md."""

_LAYER = re.compile(r"sections\.(\d+)\.layers\.(\d+)\.(.+)")


def upcycle(
    source: str | Path,
    destination: str | Path,
    section_layers: Sequence[int],
    options: ConversionOptions,
    *,
    output_scale: float,
) -> ConversionResult:
    """Convert a Llama directory (or a sequential run) to the model directory of a StagFormer.

    Args:
        section_layers: layers of each section; the sum must be the number of layers of the Llama.
        output_scale: scale of the output projection of cross-attention; 0 starts with no effect of cross-attention.

    Raises:
        CheckpointError: the source is a StagFormer already, or the layers do not add up; else as `export`.
        ConfigError: the scale is not a finite number.
    """
    if not math.isfinite(output_scale):
        raise ConfigError(f"--output-scale is {output_scale}; give a finite number (0: no effect at the start)")
    require_free(Path(destination), options)
    llama = open_weights(source)
    if llama.model.staggered:
        raise CheckpointError(f"{llama.directory} is a StagFormer already; upcycle takes a Llama or a sequential run")
    if len(section_layers) < 2 or min(section_layers) < 1 or sum(section_layers) != llama.model.num_layers:
        raise CheckpointError(
            f"{llama.directory} has {llama.model.num_layers} layers; --section-layers {list(section_layers)} must be "
            "two numbers or more, each at least 1, that add up to them"
        )
    keys = llama.model.model_dump() | {"connection": "staggered", "section_layers": tuple(section_layers)}
    model, problems = validate_model(keys)
    if model is None or problems:
        raise ConfigError(f"{llama.directory} cannot become a StagFormer: {'; '.join(problems)}")
    initial = UpcycledWeights(llama, model, output_scale)
    new = NewModel([llama], model, initial.weight, llama.dtype, "equal to their rules", logits_of=initial)
    return write_model(new, Path(destination), options)


class UpcycledWeights:
    """Initial parameters of the StagFormer, each computed by its rule when it is read."""

    def __init__(self, llama: WeightSource, model: ModelConfig, output_scale: float):
        self._llama, self.model, self._scale = llama, model, output_scale
        self.directory, self.dtype = llama.directory, llama.dtype
        self.tokens: TextTokens | None = llama.tokens
        self.check = llama.check
        self._specs = {spec.name: spec for spec in model_parameters(llama.model)}
        counts = enumerate(llama.model.section_layers)
        self._layers = [f"sections.{section}.layers.{layer}." for section, count in counts for layer in range(count)]

    def weight(self, spec: ParameterSpec) -> Tensor:
        """One global parameter of the StagFormer."""
        if match := _LAYER.fullmatch(spec.name):
            return self._of_layer(int(match[1]), int(match[2]), match[3])
        if spec.name.endswith(".memory_norm.weight"):
            return self._of_layer(int(spec.name.split(".")[1]), 0, "self_attention_norm.weight")
        if spec.name.endswith(".null_memory"):
            return torch.zeros(spec.shape, dtype=self._llama.dtype)
        return self._llama.weight(self._specs[spec.name])

    def _of_layer(self, section: int, layer: int, part: str) -> Tensor:
        index = sum(self.model.section_layers[:section]) + layer
        name = self._layers[index] + part.replace("cross_attention", "self_attention")
        value = self._llama.weight(self._specs[name])
        if part != "cross_attention.o_proj.weight":
            return value
        scaled = require_finite(value, name, self.directory) * self._scale
        if not torch.isfinite(scaled).all():
            raise ConfigError(f"--output-scale is {self._scale:g}, too large for {scaled.dtype}; give a smaller one")
        return scaled
