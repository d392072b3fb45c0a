"""One process with all sections on a CUDA device: the same numbers as the reference, and everything a run does."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.training.engine.section_engine import build_module, wrap_module
from stagdist.training.engine.step_clock import StepTimes
from tests.launch.runs import PRETRAIN, environment, losses, tiny_config, write_config
from tests.ranks import run_ranks
from tests.reference.stagformer import forward, loss
from tests.reference.variants import VARIANTS
from tests.training.comparison import mismatches, on_device
from tests.training.parity_cases import GPU_CASES, SEVERAL_BLOCKS, Case
from tests.training.parity_worker import load_reference, micro_batches
from tests.training.saving.test_resume_variants import WORKER as RESUME
from tests.training.saving.test_resume_variants import check_resumed
from tests.training.worlds import World

pytestmark = pytest.mark.gpu

EVERYTHING = VARIANTS["three sections with everything"]
EVALUATED = Case("evaluated", EVERYTHING, (1, 1, 1), device="cuda")
RESUMED = [
    replace(case, device="cuda", deterministic=True)
    for case in (
        Case("fp32", {}, (1, 1, 1)),
        Case("bf16 with everything", EVERYTHING, (1, 1, 1), precision="bf16", checkpointing="layer"),
        SEVERAL_BLOCKS,
        replace(SEVERAL_BLOCKS, name=f"{SEVERAL_BLOCKS.name}, bf16", precision="bf16"),
    )
]


def evaluate(case: Case) -> tuple[float, StepTimes, StepTimes, str]:
    """Loss of one evaluation before any training, the clocks of it and of a training step, and where it all ran."""
    groups = World(timeout_s=120).groups(case.grid)
    config = case.config()
    module = build_module(config, groups)
    load_reference(module, case, groups)
    engine = wrap_module(module, config, groups)
    tokens, labels = case.batches()[0]
    value = float(engine.eval_batch(micro_batches(case, groups, tokens, labels)))
    evaluation = engine.times
    engine.train_batch(micro_batches(case, groups, tokens, labels))
    return value, evaluation, engine.times, next(module.parameters()).device.type


@cache
def evaluated(device: str) -> tuple[float, StepTimes, StepTimes, str]:
    """The evaluation, launched once."""
    case = replace(EVALUATED, device=device)
    (report,) = run_ranks("tests.gpu.test_gpu:evaluate", 1, case, timeout_s=200, env=on_device(device))
    result: tuple[float, StepTimes, StepTimes, str] = report
    return result


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_losses_gradients_norms_and_weights_equal_the_reference(case: Case) -> None:
    assert mismatches(case) == []


def test_the_cases_cover_what_matters_on_one_device() -> None:
    assert {case.precision for case in GPU_CASES} == {"fp32", "bf16"}
    assert {case.checkpointing for case in GPU_CASES} == {"none", "layer"}
    assert {len(case.config().model.section_layers) for case in GPU_CASES} >= {1, 2, 3, 4}


def test_an_evaluation_gives_the_loss_of_the_reference() -> None:
    tokens, labels = EVALUATED.batches()[0]
    expected = float(loss(forward(EVALUATED.parameters(), EVALUATED.model_keys, tokens), labels))
    value, *_, device = evaluated(EVALUATED.device)
    assert device == EVALUATED.device
    assert abs(value - expected) <= 1e-5


def test_the_clock_of_events_measures_training_and_evaluation() -> None:
    _, evaluation, training, _ = evaluated(EVALUATED.device)
    for times in (evaluation, training):
        assert 0 < times.compute_s < times.pipeline_s
    assert training.update_s > 0


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reports of the runs that were saved and begun again."""
    payload = (RESUMED, tmp_path_factory.mktemp("resumed"))
    (reports,) = run_ranks(RESUME, 1, payload, timeout_s=200, env=on_device(RESUMED[0].device))
    result: dict[str, Any] = reports
    return result


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_steps_after_a_resume_are_bit_equal(case: Case, resumed: dict[str, Any]) -> None:
    check_resumed([resumed[case.name]])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte corpus."""
    prefix = tmp_path_factory.mktemp("corpus") / "stdlib"
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    prepare([str(path) for path in files], str(prefix), byte_tokenizer())
    return prefix


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_finds_the_device_by_itself_and_learns(corpus: Path, tmp_path: Path, precision: str) -> None:
    training = {"steps": 60, "precision": precision, "activation_checkpointing": "layer"}
    config = tiny_config(corpus, "gpu", training=training, checkpoint={"interval_steps": 0})
    command = [sys.executable, str(PRETRAIN), "--config", str(write_config(tmp_path, config))]
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    done = subprocess.run(
        [*command, "--set", "parallel.pipeline_parallel_size=1"], cwd=tmp_path, env=environment() | visible,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = losses(tmp_path, "gpu")
    assert all(map(math.isfinite, values.values())) and values[60] < values[1] - 0.5
    assert '"memory_cuda_peak_allocated_bytes"' in (tmp_path / "runs/gpu/metrics.jsonl").read_text()
    summary = json.loads((tmp_path / "runs/gpu/summary.json").read_text())
    assert math.isfinite(summary["test"]["bits_per_byte"])
