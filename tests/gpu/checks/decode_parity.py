"""Whether the GPU decodes what the CPU decodes."""

from dataclasses import dataclass

import pytest
import torch

from stagdist.checkpoint.reading import ReadSlice
from stagdist.config import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.loading import EngineOptions, build_stage, place_model
from stagdist.decode.request import Request, SamplingParams
from stagdist.parallel.layout import ParameterSpec
from tests.decode.decoding import Case, config_of, parameters_of, prompt
from tests.gpu.checks.environment import ROOT
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting
from tests.reference.variants import VARIANTS

TESTS = "tests/gpu/test_decode_gpu.py"


@dataclass
class Counts:
    """A plugin of pytest that counts outcomes."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for the setup, the call and the teardown of each test."""
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def decode_parity(setting: Setting) -> Numbers:
    """Run the GPU tests of decoding: every variant, eager and graphs, in fp64 and in bf16 with real head sizes."""
    numbers: Numbers = {"tokens_compared": _fixed_step_against_eager(setting)}
    counts = Counts()
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(ROOT / TESTS)], [counts])
    numbers |= vars(counts)
    setting.keep(numbers)
    assert code == pytest.ExitCode.OK and counts.failed == 0, f"pytest {TESTS} ends with {code!r}: {counts}"
    if setting.on_gpu:
        assert counts.passed > 0 and counts.skipped == 0, f"tests were skipped although there is a GPU: {counts}"
    else:
        assert counts.skipped > 0 and counts.passed == 0, f"tests for a GPU ran without one: {counts}"
        numbers["impossible"] = {TESTS: NEEDS_GPU}
    return numbers


def _fixed_step_against_eager(setting: Setting) -> int:
    """Tokens of two variants, with the fixed step that graphs capture and without; how many were compared."""
    requests = [Request(str(size), prompt(size), SamplingParams(max_new_tokens=6, temperature=0.0)) for size in (1, 7)]
    compared = 0
    for name in ("default", "three sections with everything"):
        tokens = []
        for graphs in (False, True):
            options = EngineOptions(precision="fp64", chunk_size=5, num_slots=2, graphs=graphs)
            case = Case(name, VARIANTS.get(name, {}), requests, options)
            tokens.append(tokens_of_one_process(case, setting.device))
        assert tokens[0] == tokens[1], f"{name}: eager {tokens[0]}, fixed step {tokens[1]}"
        compared += sum(map(len, tokens[0]))
    return compared


def tokens_of_one_process(case: Case, device: str) -> list[tuple[int, ...]]:
    """Tokens of each request of a case, from an engine that holds the whole model."""
    placement = place_model(ModelConfig(**config_of(case.keys)), case.options, 1)
    engine = Engine(build_stage(placement, reader(case), device, None))
    return [completion.token_ids for completion in engine.generate(case.requests)]


def reader(case: Case) -> ReadSlice:
    """Slices of the weights of a case."""
    parameters = parameters_of(case)

    def read(spec: ParameterSpec, dim: int, start: int, stop: int) -> torch.Tensor:
        return parameters[spec.name].narrow(dim, start, stop - start)

    return read
