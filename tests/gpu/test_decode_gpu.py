"""Decoding on a CUDA device: graphs, streams and batched sections against the same engine on the CPU."""

import pytest
import torch

from stagdist.config import ModelConfig
from stagdist.decode.engine import Completion, Engine
from stagdist.decode.loading import EngineOptions, build_stage, place_model
from stagdist.decode.request import Request, SamplingParams
from stagdist.parallel.layout import ParameterSpec
from tests.decode.decoding import Case, config_of, parameters_of, prompt
from tests.reference.variants import VARIANTS

pytestmark = pytest.mark.gpu

REQUESTS = [
    Request(str(length), prompt(length), SamplingParams(max_new_tokens=new, temperature=temperature, seed=length))
    for length, new, temperature in ((1, 8, 0.0), (2, 3, 1.0), (4, 9, 0.0), (6, 2, 0.7), (13, 11, 0.0), (24, 4, 1.0))
]


def complete(case: Case, device: str) -> list[Completion]:
    """All requests of a case on one device."""
    placement = place_model(ModelConfig(**config_of(case.keys)), case.options, 1)
    parameters = parameters_of(case)

    def read(spec: ParameterSpec, dim: int, start: int, stop: int) -> torch.Tensor:
        return parameters[spec.name].narrow(dim, start, stop - start)

    return Engine(build_stage(placement, read, device, None)).generate(case.requests)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_tokens_of_a_cpu(variant: str, graphs: bool) -> None:
    options = EngineOptions(precision="fp64", chunk_size=5, num_slots=3, graphs=graphs)
    case = Case(variant, VARIANTS[variant], REQUESTS, options)
    assert [each.token_ids for each in complete(case, "cuda")] == [each.token_ids for each in complete(case, "cpu")]
