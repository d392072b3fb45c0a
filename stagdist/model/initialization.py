"""Initial values by canonical name, the same on every grid."""

import hashlib

import torch
from torch import Tensor

from stagdist.parallel.layout import ParameterSpec, padded_vocab_size


def initial_value(spec: ParameterSpec, seed: int) -> Tensor:
    """The full parameter, fp32 on the CPU.

    Each parameter has its own generator, seeded with (seed, canonical name), so its values depend on nothing else.
    """
    if spec.std is None:
        return torch.full(spec.shape, spec.fill)
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(spec.shape).normal_(std=spec.std, generator=generator)


def local_slice(value: Tensor, spec: ParameterSpec, tensor_rank: int, tensor_size: int) -> Tensor:
    """The part of a full parameter that one tensor rank holds; a padded vocabulary ends in zeros.

    Shapes: `spec.shape` -> `spec.local_shape(tensor_size)`.
    """
    if spec.shard_dim is None or tensor_size == 1:
        return value
    if spec.vocabulary:
        missing = padded_vocab_size(spec.shape[0], tensor_size) - spec.shape[0]
        value = torch.cat((value, value.new_zeros(missing, *spec.shape[1:])))
    return value.chunk(tensor_size, dim=spec.shard_dim)[tensor_rank]
