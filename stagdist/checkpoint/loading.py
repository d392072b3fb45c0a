"""A model directory back into a model."""

from pathlib import Path

import torch

from stagdist.checkpoint.model_directory import read_model_config, read_tensors
from stagdist.model.megatron import TensorParallel
from stagdist.model.stagformer import StagFormer, canonical_slice


def load_model(directory: str | Path, parallel: TensorParallel) -> StagFormer:
    """The whole model with this tensor rank's slices, in evaluation mode and in `parallel.dtype`.

    Raises:
        CheckpointError: the directory is incomplete or of another shape, naming the tensor.
    """
    config = read_model_config(directory)
    model = StagFormer(config, parallel)
    readers = {spec.name: (spec, read) for spec, read in read_tensors(directory, config)}
    specs = {name: spec for name, (spec, _) in readers.items()}
    with torch.no_grad():
        for name, parameter in model.canonical_parameters().items():
            parameter.copy_(canonical_slice(specs, name, lambda spec: readers[spec.name][1](), parallel))
    return model.eval()
