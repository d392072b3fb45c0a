"""Two processes over nccl, on two GPUs or on one that they share; over gloo in a rehearsal."""

import os
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions, build_stage, joined_world, plan_decoding
from stagdist.decode.topology import HeadLayout
from stagdist.parallel.world import choose_device
from stagdist.telemetry.spans import Span
from tests.decode.decoding import Case, config_of, prompt, reader
from tests.gpu.checks.environment import loaded_nccl
from tests.gpu.checks.models import span_recorder
from tests.gpu.checks.setting import ImpossibleError, Numbers, Setting
from tests.gpu.decode_cases import tokens

SHARED_GPU_NCCL = (2, 30)
"""First release of NCCL that lets two ranks share a GPU."""
TIMEOUT_S = 20.0
"""Limit of every wait. Ranks compile kernels before they meet, some longer than others."""
LARGE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "section_layers": [2, 2],
    "max_position_embeddings": 256,
}
"""On a GPU: a hand-off of a chunk of a prompt has 128 KiB, more than NCCL buffers in these checks."""


def decode(
    setting: Setting, head: HeadLayout, *, combined: bool = False, graphs: bool = True, traced: bool = False
) -> Numbers:
    """Decode on two stages; the tokens must be those of one process on the CPU, in fp64.

    Args:
        graphs: each rank runs a step as one graph, on a GPU with Triton kernels; on a CPU the step of fixed shape.
    """
    check_ranks_can_meet(setting)
    case = case_of(setting, head, combined=combined, graphs=graphs)
    plan = plan_decoding(ModelConfig(**config_of(case.keys)), case.options, 2)
    device = choose_device(setting.rank_device)
    with joined_world(plan, device) as transport:
        assert transport is not None
        recorder = span_recorder(device, transport.rank, transport.stage) if traced else None
        stage = build_stage(plan, reader(case), device, transport, recorder=recorder)
        assert stage.setup.fixed == graphs and stage.setup.kernels == (graphs and setting.on_gpu)
        if transport.rank > 0:
            operate(stage, transport, None)
            return {}
        engine = Engine(stage, transport, heartbeat_s=TIMEOUT_S / 3)
        began = time.perf_counter()
        completions = engine.generate(case.requests)
        seconds = time.perf_counter() - began
    numbers: Numbers = {"device": device, "nccl": loaded_nccl(), "seconds": seconds, "steps": engine.steps}
    if recorder is not None:
        numbers["span_ms"] = _span_ms(recorder.spans)
    setting.keep(numbers)
    found = [completion.token_ids for completion in completions]
    expected = tokens(replace(case, options=replace(case.options, head="last", graphs=False)), "cpu")
    assert found == expected, f"two ranks gave {found}, one process gave {expected}"
    return numbers | {"tokens": sum(map(len, found))}


def training(setting: Setting) -> Numbers:
    """Train three steps on two stages; losses, gradients, norms and weights must be those of the reference."""
    from tests.training.comparison import mismatches
    from tests.training.parity_cases import BF16_CASES, CASES, SEVERAL_BLOCKS
    from tests.training.parity_worker import run_cases

    check_ranks_can_meet(setting)
    if setting.gpus == 1:
        os.environ["LOCAL_RANK"] = "0"  # both ranks take the one GPU
    names = ["grid 2x1x1"]
    if setting.on_gpu:
        names += ["shared on 2x1x1", "checkpointing on 2x1x1", "bf16, default on 2x1x1"]
    cases = [case for case in CASES + BF16_CASES if case.name in names]
    assert len(cases) == len(names), f"of {names} only {[case.name for case in cases]} exist"
    # Its hand-offs are more than NCCL buffers in these checks.
    cases.append(replace(SEVERAL_BLOCKS, grid=(2, 1, 1), precision=setting.precision))
    own = run_cases(cases)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, own, group=dist.new_group(backend="gloo"))
    if dist.get_rank() > 0:
        return {}
    problems = {case.name: mismatches(case, [reports[case.name] for reports in gathered]) for case in cases}
    wrong = {name: found for name, found in problems.items() if found}
    assert not wrong, f"differences from the reference: {wrong}"
    return {"cases": [case.name for case in cases], "losses": own[names[0]].losses}


def check_ranks_can_meet(setting: Setting) -> None:
    """Whether the NCCL library in this process lets the ranks have the GPUs that there are.

    Raises:
        ImpossibleError: it does not.
    """
    if setting.gpus != 1:
        return
    version = loaded_nccl() or torch.cuda.nccl.version()[:3]
    if version[:2] < SHARED_GPU_NCCL:
        needed = ".".join(map(str, SHARED_GPU_NCCL))
        raise ImpossibleError(
            f"one GPU, and NCCL {'.'.join(map(str, version))} does not let two ranks share it; {needed} does, "
            "--nccl names another library"
        )


def case_of(setting: Setting, head: HeadLayout, *, combined: bool, graphs: bool) -> Case:
    """The model and the requests of a check, greedy and sampled ones."""
    keys: dict[str, Any] = (LARGE if setting.on_gpu else {}) | {"combine_sections": combined}
    lengths = (3, 150, 70, 1) if setting.on_gpu else (3, 13, 7, 1)
    requests = [
        Request(str(length), prompt(length), SamplingParams(max_new_tokens=6, temperature=index % 2 * 0.7, seed=length))
        for index, length in enumerate(lengths)
    ]
    chunk = 64 if setting.on_gpu else 5
    options = EngineOptions(
        precision="fp64", head=head, num_slots=2, chunk_size=chunk, timeout_s=TIMEOUT_S,
        graphs=None if graphs and setting.on_gpu else graphs,  # the default of a GPU
    )  # fmt: skip
    return Case("two ranks", keys, requests, options)


def _span_ms(spans: tuple[Span, ...]) -> Numbers:
    """Milliseconds of all spans of a category together."""
    assert spans, "the recorder has no spans"
    total: dict[str, float] = defaultdict(float)
    for span in spans:
        total[span.category] += (span.end_ns - span.begin_ns) / 1e6
    return dict(total)
