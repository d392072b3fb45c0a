"""A model directory back into a model."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stagdist.checkpoint.published.reader import ModelReader
from stagdist.config.parts import ModelConfig
from stagdist.model.megatron import TensorParallel
from stagdist.model.stagformer import StagFormer, canonical_slice
from stagdist.parallel.layout import ParameterSpec, model_parameters


def load_model(directory: str | Path, parallel: TensorParallel) -> StagFormer:
    """The whole model with this tensor rank's slices, in evaluation mode and in `parallel.dtype`.

    Raises:
        CheckpointError: the directory is incomplete or of another shape, naming the tensor.
    """
    reader = ModelReader(directory)
    return load_weights(reader.model, reader.whole, parallel)


def load_weights(
    config: ModelConfig, weight: Callable[[ParameterSpec], Tensor], parallel: TensorParallel
) -> StagFormer:
    """A model with this tensor rank's slices, in evaluation mode and in `parallel.dtype`.

    Args:
        weight: the complete tensor of a parameter.
    """
    model = StagFormer(config, parallel)
    specs = {spec.name: spec for spec in model_parameters(config)}
    with torch.no_grad():
        for name, parameter in model.canonical_parameters().items():
            parameter.copy_(canonical_slice(specs, name, weight, parallel))
    return model.eval()
