"""Whether the GPU decodes what the CPU decodes."""

from collections.abc import Callable
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
from tests.gpu.decode_cases import WAYS, build, running, tokens
from tests.reference.variants import VARIANTS

TESTS = tuple(
    f"tests/{name}.py"
    for name in ("decode/test_sampling_kernels", "decode/test_sampler", "decode/test_noise", "gpu/test_decode_gpu")
)
REASON_CHARACTERS = 300
REFERENCE_THREADS = 8
"""Of the CPU, for the reference of the logits."""


@dataclass
class Outcomes:
    """A plugin of pytest that counts outcomes and keeps what tests record with `record_property`: errors of logits.

    Attributes:
        failures: last line of the traceback, by test.
        keep: called with all numbers after each test.
    """

    keep: Callable[[Numbers], None]
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    errors: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def as_numbers(self) -> Numbers:
        """What was counted and kept."""
        return {name: value for name, value in vars(self).items() if name != "keep"}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for the setup, the call and the teardown of each test."""
        if report.failed:
            self.failed += 1
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures[report.nodeid] = str(report.longrepr if crash is None else crash.message)[:REASON_CHARACTERS]
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1
        self.errors |= dict(report.user_properties)
        if report.when == "teardown":
            self.keep(self.as_numbers())


def decode_parity(setting: Setting) -> Numbers:
    """Run the GPU tests of decoding: sampling; every variant in each of `WAYS`; real head sizes in bf16 and fp32."""
    numbers: Numbers = {"tokens_compared": _ways_compared(setting)}
    setting.keep(numbers)
    outcomes = Outcomes(lambda found: setting.keep(numbers | found))
    if setting.on_gpu:
        torch.set_num_threads(REFERENCE_THREADS)
    files = [str(ROOT / name) for name in TESTS]
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files], [outcomes])
    numbers |= outcomes.as_numbers()
    bf16 = [found for name, found in outcomes.errors.items() if ", bf16, " in name]
    if bf16:
        numbers["bf16_max_abs"] = max(found["max_abs"] for found in bf16)
        numbers["bf16_top1"] = min(found["top1"] for found in bf16)
    setting.keep(numbers)
    assert code == pytest.ExitCode.OK and not outcomes.failed, f"pytest ends with {code!r}: {outcomes.failures}"
    counts = f"{outcomes.passed} passed, {outcomes.skipped} skipped"
    if setting.on_gpu:
        assert outcomes.passed > 0 and outcomes.skipped == 0, f"tests were skipped although there is a GPU: {counts}"
        assert bf16, "the tests recorded no errors of bf16"
    else:
        assert outcomes.skipped > 0 and outcomes.passed == 0, f"tests for a GPU ran without one: {counts}"
        numbers["impossible"] = dict.fromkeys(TESTS, NEEDS_GPU)
    return numbers


def sanitizer(setting: Setting) -> Numbers:
    """Run the steps that graphs capture, but not captured, while torch looks for data races between their streams.

    It does not see what kernels of Triton read and write, so there are none.
    """
    if setting.on_gpu:
        from torch.cuda import _sanitizer

        _sanitizer.enable_cuda_sanitizer()
        values = torch.ones(8, device=setting.device)
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(_sanitizer.CUDASanitizerErrors):
            values.add_(1.0)  # a race: without it the sanitizer would look at nothing
    compared = 0
    for case in _cases("graphs"):
        with mock.patch.object(graphs.StepGraphs, "capture"):
            stage = build(case, setting.device)
        found = [completion.token_ids for completion in Engine(stage).generate(case.requests)]
        expected = tokens(case, "cpu") if setting.on_gpu else found
        assert found == expected, f"{case.name}: {found}, on the CPU {expected}"
        compared += sum(map(len, found))
    impossible = {} if setting.on_gpu else {"impossible": {"races": NEEDS_GPU}}
    return {"tokens": compared, **impossible}


def _ways_compared(setting: Setting) -> int:
    """Tokens of two variants in each of `WAYS`; how many were compared."""
    compared = 0
    for cases in zip(*map(_cases, WAYS), strict=True):
        found = {way: tokens(case, setting.device) for way, case in zip(WAYS, cases, strict=True)}
        assert all(each == found["eager"] for each in found.values()), f"{cases[0].name}: {found}"
        compared += sum(map(len, found["eager"]))
    return compared


def _cases(way: str) -> list[Case]:
    requests = [Request(str(size), prompt(size), SamplingParams(max_new_tokens=6, temperature=0.0)) for size in (1, 7)]
    options = running(EngineOptions(precision="fp64", chunk_size=5, num_slots=2), way)
    names = ("default", "three sections with everything")
    cases = [Case(name, VARIANTS.get(name, {}), requests, options) for name in names]
    return [*cases, replace(cases[0], name="int8", options=replace(options, weights="int8"))]
