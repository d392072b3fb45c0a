"""Training in a world of one: equal to the reference, resumed bit by bit, and how fast."""

import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.training.site import random_batches
from stagdist.config.loading import load_config
from stagdist.config.run_config import RunConfig
from stagdist.parallel.grid import grid_for
from stagdist.planning.flops import flops_per_token
from stagdist.planning.plan import plan
from stagdist.telemetry.hardware import peak_flops
from stagdist.training.engine.distributed import start_distributed
from stagdist.training.engine.section_engine import build_engine
from tests.gpu.checks.environment import ROOT
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting
from tests.gpu.checks.timing import wait
from tests.reference.variants import VARIANTS
from tests.training.comparison import mismatches
from tests.training.parity_cases import BF16_CASES, CASES, SEVERAL_BLOCKS, Case
from tests.training.parity_worker import run_cases
from tests.training.saving.test_resume_variants import check_resumed, resume_cases

PARITY = ("grid 1x1x1", "three sections with everything on 1x1x1", "checkpointing on 1x1x1", "bf16, default on 1x1x1")
RUNS = ("pythia-410m-staggered", "pythia-410m-sequential")
MICRO_BATCHES = 4
COLD_STEPS = 2
"""First steps, which load kernels and make plans."""
TINY = (
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=16",
    "model.section_layers=[1, 1]",
)
PARTS = {
    "cross_entropy": r"(autograd::engine::evaluate_function: )?(\w*CrossEntropy|_TokenNats)(?(1)Backward)",
    "attention": r"aten::scaled_dot_product_attention|autograd::engine::evaluate_function: ScaledDotProduct\w+",
    "optimizer": r"Optimizer\.step#.*",
}
"""Operators whose time, kernels included, is that of a part of the step; none is called by another of its part."""


def training_parity(setting: Setting) -> Numbers:
    """Losses, gradients, norms and weights of four runs against the reference."""
    names = PARITY if setting.on_gpu else PARITY[:1]
    cases = [case for case in CASES + BF16_CASES if case.name in names]
    assert len(cases) == len(names), f"of {names} only {[case.name for case in cases]} exist"
    reports = run_cases(cases)
    wrong = {case.name: found for case in cases if (found := mismatches(case, [reports[case.name]]))}
    assert not wrong, f"differences from the reference: {wrong}"
    return {"cases": [case.name for case in cases]}


def training_resume(setting: Setting) -> Numbers:
    """With deterministic kernels a run that goes on from its checkpoint computes the bits of one that never stopped."""
    cases = [Case("small", {}, (1, 1, 1)), replace(SEVERAL_BLOCKS, precision=setting.precision)]
    if setting.on_gpu:
        everything = VARIANTS["three sections with everything"]
        cases.append(Case("everything", everything, (1, 1, 1), precision="bf16", checkpointing="layer"))
    cases = [replace(case, deterministic=True) for case in cases]
    with tempfile.TemporaryDirectory(prefix="stagdist-check-") as folder:
        reports = resume_cases((cases, Path(folder)))
    for case in cases:
        check_resumed([reports[case.name]])
    names = [f"{case.name}, {case.precision}" for case in cases]
    return {"deterministic": torch.are_deterministic_algorithms_enabled(), "cases": names}


def training_speed(setting: Setting) -> Numbers:
    """Tokens/s, MFU, peak memory against the plan, and shares of a step's kernels, for both connections in bf16."""
    configs = [_config(setting, name) for name in RUNS]
    groups = start_distributed(grid_for(configs[0], 1), setting.device, configs[0].parallel.timeout_s)
    numbers: Numbers = {}
    for config in configs:
        held = _reset_peak(setting)
        engine = build_engine(config, groups)
        step = partial(engine.train_batch, random_batches(config, setting.device))
        numbers[config.name] = {"held_before_bytes": held, **_speed(setting, config, step)}
        setting.keep(numbers)
        numbers[config.name]["shares"] = _shares(setting, step)
        setting.keep(numbers)
        del engine, step
    if not setting.on_gpu:
        numbers["impossible"] = {
            "mfu, peak_bytes": NEEDS_GPU,
            "shares": f"of kernels, {NEEDS_GPU}; these are host time",
        }
    return numbers


def _config(setting: Setting, name: str) -> RunConfig:
    micro_batch = 4 if setting.on_gpu else 1
    overrides = (
        "parallel.pipeline_parallel_size=1",
        f"training.micro_batch_size={micro_batch}",
        f"training.global_batch_size={MICRO_BATCHES * micro_batch}",
        *(() if setting.on_gpu else TINY),
    )
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


def _speed(setting: Setting, config: RunConfig, step: Callable[[], Any]) -> Numbers:
    times_s, losses = [], []
    for _ in range(COLD_STEPS + (4 if setting.on_gpu else 1)):
        wait(setting.device)
        began = time.perf_counter()
        losses.append(float(step()))
        wait(setting.device)
        times_s.append(time.perf_counter() - began)
    median_s = statistics.median(times_s[COLD_STEPS:])
    tokens_per_s = config.training.global_batch_size * config.sequence_length / median_s
    flops = tokens_per_s * flops_per_token(config.model, config.sequence_length)
    peak = peak_flops(torch.cuda.get_device_name(0) if setting.on_gpu else None, "bf16")
    memory = plan(config, 1).stages[0].memory
    return {
        "step_s": times_s,
        "losses": losses,
        "tokens_per_s": tokens_per_s,
        "tflop_per_s": flops / 1e12,
        "mfu": None if peak is None else flops / peak,
        "peak_bytes": torch.cuda.max_memory_allocated() if setting.on_gpu else None,
        "planned_bytes": None if memory is None else memory.total,
    }


def _reset_peak(setting: Setting) -> int:
    """Bytes on the GPU that earlier runs have left."""
    gc.collect()
    if not setting.on_gpu:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _shares(setting: Setting, step: Callable[[], Any]) -> Numbers:
    """Share of each part in the kernels' time of a step, in the host's time on a CPU; None where no operator fits."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * setting.on_gpu
    with profile(activities=activities) as profiler:
        step()
        wait(setting.device)
    parts = dict.fromkeys(PARTS, 0.0)
    total = 0.0
    for event in profiler.events() or []:
        if event.device_type == DeviceType.CPU:
            total += 0.0 if setting.on_gpu else event.self_cpu_time_total
            for part, pattern in PARTS.items():
                if re.fullmatch(pattern, event.name):
                    parts[part] += event.device_time_total if setting.on_gpu else event.cpu_time_total
        elif not event.is_user_annotation:
            total += event.time_range.elapsed_us()
    return {part: microseconds / total or None for part, microseconds in parts.items()} | {"total_us": total}
