"""One world of one rank for all tests of the model."""

from collections.abc import Iterator

import pytest
import torch

from stagdist.model.megatron import TensorParallel
from stagdist.parallel.groups import single_process


@pytest.fixture(scope="module")
def alone() -> Iterator[TensorParallel]:
    """The tensor axis of a single rank, for parameters in fp64."""
    with single_process() as groups:
        yield TensorParallel(groups.tensor, torch.float64)
