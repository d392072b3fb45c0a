"""A model directory back into a model."""

from pathlib import Path

import torch

from stagdist.checkpoint.published.reader import ModelReader
from stagdist.model.megatron import TensorParallel
from stagdist.model.stagformer import StagFormer, canonical_slice
from stagdist.parallel.layout import model_parameters


def load_model(directory: str | Path, parallel: TensorParallel) -> StagFormer:
    """The whole model with this tensor rank's slices, in evaluation mode and in `parallel.dtype`.

    Raises:
        CheckpointError: the directory is incomplete or of another shape, naming the tensor.
    """
    reader = ModelReader(directory)
    model = StagFormer(reader.model, parallel)
    specs = {spec.name: spec for spec in model_parameters(reader.model)}
    with torch.no_grad():
        for name, parameter in model.canonical_parameters().items():
            parameter.copy_(canonical_slice(specs, name, reader.whole, parallel))
    return model.eval()
