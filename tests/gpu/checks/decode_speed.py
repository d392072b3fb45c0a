"""How fast the paper's shapes decode on one device, with CUDA graphs, with Triton kernels and without either."""

import time
from collections import defaultdict
from typing import Any

from benchmarks.decoding.bounds import step_bytes
from stagdist.parallel.device import choose_attention
from tests.gpu.checks.models import (
    COLD_TOKENS,
    HALF,
    SEQUENTIAL,
    SHAPES,
    SHARED,
    STAGGERED,
    STALL_MS,
    WITH,
    WITHOUT,
    Decoder,
    kernel_ways,
    shape,
    span_recorder,
    watched_graphs,
)
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting, goal
from tests.gpu.checks.timing import bandwidths

SHARE_GOAL = 0.76
SPEED_UP_GOAL = 1.8
HALF_GOAL = 1.1
"""Of the time of shared 2x18 over that of the 18 layers that it reads."""
CHOICE_GOAL = 1.03
"""Of the time of a sampled token over that of a greedy one."""
GREEDY, *CHOSEN = CHOICES = ("greedy", "sampled", "truncated")
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.7},
    "truncated": {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
}
SHORT_RUN = 16 + COLD_TOKENS + 1
"""New tokens of a run with 16 gaps that count."""


def decode_speed(setting: Setting) -> Numbers:
    """Milliseconds per token of each shape in bf16 at batch 1, against the bandwidth of the device, with graphs.

    A goal that is missed does not fail the check.
    """
    numbers: Numbers = {**bandwidths(setting), "shapes": {}}
    for way, kernels in kernel_ways(setting).items():
        for name in SHAPES:
            of_shape = numbers["shapes"].setdefault(name, {})
            of_shape[way] = _with_graphs(setting, name, kernels, numbers["read_tb_s"])
            numbers["goals"] = _goals(setting, numbers["shapes"])
            setting.keep(numbers)
    if not setting.on_gpu:
        numbers["impossible"] = {"with kernels, capture_ms, replay_ms, goals": f"{NEEDS_GPU} and real shapes"}
    return numbers


def _goals(setting: Setting, shapes: Numbers) -> Numbers:
    """The goals that can be judged by the shapes measured so far."""
    way = WITH if setting.on_gpu else WITHOUT
    found = {name: of_shape[way] for name, of_shape in shapes.items() if way in of_shape}
    ms = {name: each[GREEDY]["ms_per_token"] for name, each in found.items()}
    goals: Numbers = {}
    if SEQUENTIAL in found:
        share = found[SEQUENTIAL]["share_of_bandwidth"]
        goals[f"share of read bandwidth, {SEQUENTIAL}"] = goal(setting, SHARE_GOAL, share, share >= SHARE_GOAL)
    if found.keys() >= {SEQUENTIAL, SHARED}:
        speed_up = ms[SEQUENTIAL] / ms[SHARED]
        goals[f"tokens/s of {SHARED} over {SEQUENTIAL}"] = goal(
            setting, SPEED_UP_GOAL, speed_up, speed_up >= SPEED_UP_GOAL
        )
    if found.keys() >= {HALF, SHARED}:
        slower = ms[SHARED] / ms[HALF]
        goals[f"time of {SHARED} over {HALF}"] = goal(setting, HALF_GOAL, slower, slower <= HALF_GOAL)
    for choice in CHOSEN:
        slower = max(each[choice]["ms_per_token"] / each[GREEDY]["ms_per_token"] for each in found.values())
        goals[f"time of a {choice} token over a greedy one, slowest shape"] = goal(
            setting, CHOICE_GOAL, slower, slower <= CHOICE_GOAL
        )
    stalls = sum(each["long"]["stalls"] for each in found.values())
    gaps = min(each["long"]["gaps"] for each in found.values())
    goals[f"stalls above {STALL_MS:g} ms in {gaps} gaps between tokens after the first {COLD_TOKENS}, all shapes"] = (
        goal(setting, 0, stalls, stalls == 0)
    )
    return goals


def eager(setting: Setting) -> Numbers:
    """The 2x18 shape without graphs, and the time of each instruction.

    16 more tokens are decoded with cuDNN's attention, which decoding turns off, and 16 without.
    """
    model, (prompt, new_tokens) = shape(setting, STAGGERED), (480, 64) if setting.on_gpu else (8, 12)
    numbers: Numbers = {}
    tokens = {}
    for name, graphs in (("eager", False), ("graphs", True)):
        decoder = Decoder(setting, model, graphs=graphs)
        decoder.run(prompt, 8)
        decoded = decoder.run(prompt, new_tokens)
        numbers[name], tokens[name] = decoded.as_numbers(), decoded.tokens
        if not graphs:
            choose_attention(training=True)
            # Other numbers of keys than any before, as every token of a text has.
            numbers["eager with cuDNN"] = decoder.run(prompt + new_tokens, SHORT_RUN).as_numbers()
            choose_attention(training=False)
            numbers["eager without cuDNN"] = decoder.run(prompt + new_tokens, SHORT_RUN).as_numbers()
        decoder.close()
        setting.keep(numbers)
    numbers["eager_over_graphs"] = numbers["eager"]["ms_per_token"] / numbers["graphs"]["ms_per_token"]
    # bf16 promises equal tokens for one way of running only: recorded, not required.
    pairs = list(zip(tokens["eager"], tokens["graphs"], strict=True))
    numbers["equal_tokens"] = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    recorder = span_recorder(setting.device)
    decoder = Decoder(setting, model, graphs=False, recorder=recorder)
    decoder.run(prompt, new_tokens)
    numbers["ms_per_instruction"] = _per_instruction(recorder.spans, steps=new_tokens - 1)
    decoder.close()
    return numbers


def _with_graphs(setting: Setting, name: str, kernels: bool | None, read_tb_s: float) -> Numbers:
    # On a GPU the measured tokens lie around position 512.
    context, short, prompt, gaps = (512, 64, 500, 512) if setting.on_gpu else (16, 10, 20, 35)
    numbers: Numbers = {}
    with watched_graphs() as graphs:
        began = time.perf_counter()
        decoder = Decoder(setting, shape(setting, name), kernels=kernels)
        numbers["build_s"] = time.perf_counter() - began
        read_bytes = numbers["bytes_per_step"] = sum(step_bytes(decoder.stage, context, 1).values())
        for choice in CHOICES:
            params = PARAMS[choice]
            decoder.run(context - short // 2, COLD_TOKENS + 2, **params)
            decoded = decoder.run(context - short // 2, short, **params)
            numbers[choice] = decoded.as_numbers()
            # Without the engine: the next request gets caches and positions of its own.
            with decoder.sampling(**params):
                numbers[choice]["replay_ms"] = graphs.replay_ms(setting.device)
            if choice == GREEDY:
                numbers["share_of_bandwidth"] = _share(read_bytes, decoded.median_ms, read_tb_s)
            if choice == GREEDY and graphs.last is not None:
                replay_ms = numbers[choice]["replay_ms"]
                numbers["replay_share_of_bandwidth"] = _share(read_bytes, replay_ms, read_tb_s)
        numbers["long"] = decoder.run(prompt, gaps + COLD_TOKENS + 1).as_numbers()
        numbers |= {"captures": len(graphs.capture_ms), "capture_ms": sum(graphs.capture_ms)}
        graphs.last = None
    decoder.close()
    return numbers


def _share(num_bytes: int, milliseconds: Any, tb_s: float) -> float:
    return num_bytes / (1e9 * milliseconds) / tb_s


def _per_instruction(spans: Any, steps: int) -> Numbers:
    """Milliseconds per step of each kind of instruction; those of the prompt are left out by their step."""
    total_ms: dict[str, float] = defaultdict(float)
    first = min(span.step for span in spans)
    for span in spans:
        # Before its first step the stage counts the prompt as that step.
        if span.step > first:
            total_ms[span.name] += (span.end_ns - span.begin_ns) / 1e6
    return {name: milliseconds / max(1, steps - 1) for name, milliseconds in sorted(total_ms.items())}
