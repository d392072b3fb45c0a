"""Build a model from stored weights."""

from pathlib import Path

import torch

from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.weight_source import WeightSource
from stagdist.model.megatron import TensorParallel
from stagdist.model.stagformer import StagFormer, canonical_slice
from stagdist.parallel.layout import model_parameters


def load_model(directory: str | Path, parallel: TensorParallel) -> StagFormer:
    """Build the model of a model directory: see `build_model`.

    Raises:
        CheckpointError: the directory is incomplete or a tensor has another shape; the message names the tensor.
    """
    return build_model(ModelReader(directory), parallel)


def build_model(source: WeightSource, parallel: TensorParallel) -> StagFormer:
    """Build all sections with this tensor rank's slices, in evaluation mode and in `parallel.dtype`."""
    model = StagFormer(source.model, parallel)
    specs = {spec.name: spec for spec in model_parameters(source.model)}
    with torch.no_grad():
        for name, parameter in model.canonical_parameters().items():
            parameter.copy_(canonical_slice(specs, name, source.weight, parallel))
    return model.eval()
