"""Cutting the reference's parameters for a tensor rank, and putting what the ranks hold together again.

Written from the rule of the design, not from the package's own tables: projections into the residual stream are cut
by columns, all other matrices by rows, vectors are complete on every rank; the vocabulary is padded with zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

VOCABULARY = ("embedding.weight", "head.weight")
MIX = "section_mix."


def cut_dimension(name: str, value: Tensor) -> int | None:
    """Dimension of a parameter that tensor ranks split; None if each holds the full parameter."""
    if value.dim() < 2:
        return None
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0


def cut(parameters: dict[str, Tensor], name: str, rank: int, size: int) -> Tensor:
    """What tensor rank `rank` of `size` holds of the parameter `name`; `section_mix.{s}` is one value of the mix."""
    if name.startswith(MIX):
        return parameters["section_mix"][int(name.removeprefix(MIX))].reshape(1)
    value = parameters[name]
    dimension = cut_dimension(name, value)
    if dimension is None:
        return value
    if name in VOCABULARY and value.shape[0] % size:
        value = torch.cat([value, value.new_zeros(size - value.shape[0] % size, value.shape[1])])
    return value.tensor_split(size, dim=dimension)[rank]


def join(name: str, parts: Sequence[Tensor], vocab_size: int) -> Tensor:
    """The full parameter (or gradient), joined from the parts of the tensor ranks in rank order.

    Raises:
        AssertionError: ranks that hold the same differ, or padding of the vocabulary is not zero.
    """
    dimension = cut_dimension(name, parts[0])
    if dimension is None:
        for part in parts[1:]:
            assert torch.equal(part, parts[0]), f"{name}: tensor ranks hold different values of a full tensor"
        return parts[0]
    full = torch.cat(list(parts), dim=dimension)
    if name in VOCABULARY:
        assert not full[vocab_size:].any(), f"{name}: padding of the vocabulary is not zero"
        full = full[:vocab_size]
    return full


def join_mix(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with `section_mix.0`, `section_mix.1`, ... as one `section_mix`."""
    mix = sorted((int(name.removeprefix(MIX)), value) for name, value in named.items() if name.startswith(MIX))
    rest = {name: value for name, value in named.items() if not name.startswith(MIX)}
    return rest | {"section_mix": torch.cat([value for _, value in mix])} if mix else rest
