"""Whether the GPU decodes what the CPU decodes."""

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch

from stagdist.decode.engine import Engine
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime import graphs
from stagdist.decode.runtime.build import EngineOptions
from tests.decode.decoding import Case, prompt
from tests.gpu.checks.environment import ROOT
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting
from tests.gpu.decode_cases import build
from tests.reference.variants import VARIANTS

TESTS = "tests/gpu/test_decode_gpu.py"


@dataclass
class Outcomes:
    """A plugin of pytest that counts outcomes and keeps what tests record with `record_property`: errors of logits."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    errors: dict[str, Any] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for the setup, the call and the teardown of each test."""
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1
        self.errors |= dict(report.user_properties)


def decode_parity(setting: Setting) -> Numbers:
    """Run the GPU tests of decoding: every variant, eager and graphs, in fp64 and in bf16 with real head sizes."""
    numbers: Numbers = {"tokens_compared": _fixed_step_against_eager(setting)}
    outcomes = Outcomes()
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(ROOT / TESTS)], [outcomes])
    numbers |= vars(outcomes)
    bf16 = [found for name, found in outcomes.errors.items() if ", bf16, " in name]
    if bf16:
        numbers["bf16_max_abs"] = max(found["max_abs"] for found in bf16)
        numbers["bf16_top1"] = min(found["top1"] for found in bf16)
    setting.keep(numbers)
    assert code == pytest.ExitCode.OK and outcomes.failed == 0, f"pytest {TESTS} ends with {code!r}: {outcomes}"
    if setting.on_gpu:
        assert outcomes.passed > 0 and outcomes.skipped == 0, f"tests were skipped although there is a GPU: {outcomes}"
        assert bf16, "the tests recorded no errors of bf16"
    else:
        assert outcomes.skipped > 0 and outcomes.passed == 0, f"tests for a GPU ran without one: {outcomes}"
        numbers["impossible"] = {TESTS: NEEDS_GPU}
    return numbers


def sanitizer(setting: Setting) -> Numbers:
    """Run the steps that graphs capture, but not captured, while torch looks for data races between their streams."""
    if setting.on_gpu:
        from torch.cuda import _sanitizer

        _sanitizer.enable_cuda_sanitizer()
        values = torch.ones(8, device=setting.device)
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(_sanitizer.CUDASanitizerErrors):
            values.add_(1.0)  # a race: without it the sanitizer would look at nothing
    compared = 0
    for case in _fixed_step_cases():
        with mock.patch.object(graphs.StepGraphs, "capture"):
            stage = build(case, setting.device)
        with mock.patch.object(graphs, "on_cuda", return_value=False):
            found = [completion.token_ids for completion in Engine(stage).generate(case.requests)]
        expected = tokens_of_one_process(case, "cpu") if setting.on_gpu else found
        assert found == expected, f"{case.name}: {found}, on the CPU {expected}"
        compared += sum(map(len, found))
    impossible = {} if setting.on_gpu else {"impossible": {"races": NEEDS_GPU}}
    return {"tokens": compared, **impossible}


def _fixed_step_against_eager(setting: Setting) -> int:
    """Tokens of two variants, with the fixed step that graphs capture and without; how many were compared."""
    compared = 0
    for case in _fixed_step_cases():
        eager = replace(case, options=replace(case.options, graphs=False))
        tokens = [tokens_of_one_process(each, setting.device) for each in (eager, case)]
        assert tokens[0] == tokens[1], f"{case.name}: eager {tokens[0]}, fixed step {tokens[1]}"
        compared += sum(map(len, tokens[0]))
    return compared


def _fixed_step_cases() -> list[Case]:
    requests = [Request(str(size), prompt(size), SamplingParams(max_new_tokens=6, temperature=0.0)) for size in (1, 7)]
    options = EngineOptions(precision="fp64", chunk_size=5, num_slots=2, graphs=True)
    names = ("default", "three sections with everything")
    return [Case(name, VARIANTS.get(name, {}), requests, options) for name in names]


def tokens_of_one_process(case: Case, device: str) -> list[tuple[int, ...]]:
    """Tokens of each request of a case, from an engine that holds the whole model."""
    return [completion.token_ids for completion in Engine(build(case, device)).generate(case.requests)]
