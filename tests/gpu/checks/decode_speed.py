"""How fast the paper's shapes decode on one device, with CUDA graphs and without."""

import time
from collections import defaultdict
from typing import Any

from benchmarks.decoding.measurement import step_bytes
from stagdist.parallel.device import choose_attention
from tests.gpu.checks.models import (
    COLD_TOKENS,
    SEQUENTIAL,
    SHAPES,
    SHARED,
    STAGGERED,
    STALL_MS,
    Decoder,
    shape,
    span_recorder,
    watched_graphs,
)
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting
from tests.gpu.checks.timing import bandwidths

SHARE_GOAL = 0.45
SPEED_UP_GOAL = 1.5
SHORT_RUN = 16 + COLD_TOKENS + 1
"""New tokens of a run with 16 gaps that count."""


def decode_speed(setting: Setting) -> Numbers:
    """Milliseconds per token of each shape in bf16 at batch 1, against the bandwidth of the device, with graphs.

    A goal that is missed does not fail the check.
    """
    numbers: Numbers = {**bandwidths(setting), "shapes": {}}
    for name in SHAPES:
        numbers["shapes"][name] = _with_graphs(setting, name, numbers["read_tb_s"])
        setting.keep(numbers)
    shapes = numbers["shapes"]
    stalls = sum(each["long"]["stalls"] for each in shapes.values())
    gaps = min(each["long"]["gaps"] for each in shapes.values())
    speed_up = shapes[SEQUENTIAL]["short"]["ms_per_token"] / shapes[SHARED]["short"]["ms_per_token"]
    share = shapes[SEQUENTIAL]["share_of_bandwidth"]
    numbers["goals"] = {
        f"share of read bandwidth, {SEQUENTIAL}": _goal(SHARE_GOAL, share, share >= SHARE_GOAL),
        f"tokens/s of {SHARED} over {SEQUENTIAL}": _goal(SPEED_UP_GOAL, speed_up, speed_up >= SPEED_UP_GOAL),
        f"stalls above {STALL_MS:g} ms in {gaps} gaps between tokens after the first {COLD_TOKENS}, all shapes": _goal(
            0, stalls, stalls == 0
        ),
    }
    if not setting.on_gpu:
        for goal in numbers["goals"].values():
            goal["met"] = None
        numbers["impossible"] = {"capture_ms, replay_ms, goals": f"{NEEDS_GPU} and real shapes"}
    return numbers


def eager(setting: Setting) -> Numbers:
    """The 2x18 shape without graphs, which is how several processes decode, and the time of each instruction.

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


def _with_graphs(setting: Setting, name: str, read_tb_s: float) -> Numbers:
    # On a GPU the measured tokens lie around position 512, and the long run crosses every reach of the graphs.
    context, short, prompt, gaps = (512, 64, 500, 512) if setting.on_gpu else (16, 16, 20, 35)
    with watched_graphs() as graphs:
        began = time.perf_counter()
        decoder = Decoder(setting, shape(setting, name), graphs=True)
        build_s = time.perf_counter() - began
        decoder.run(context - short // 2, 8)
        at_context = decoder.run(context - short // 2, short)
        numbers = {
            "build_s": build_s,
            "short": at_context.as_numbers(),
            "long": decoder.run(prompt, gaps + COLD_TOKENS + 1).as_numbers(),
            "temperature 0.7": decoder.run(context - short // 2, short, temperature=0.7).as_numbers(),
            # Last, since replays without the engine leave caches that belong to no request.
            "replay_ms": graphs.replay_ms(setting.device),
            "captures": len(graphs.capture_ms),
            "capture_ms": graphs.capture_ms,
        }
        read_bytes = sum(step_bytes(decoder.stage, context, 1).values())
        numbers["bytes_per_step"] = read_bytes
        numbers["share_of_bandwidth"] = _share(read_bytes, at_context.median_ms, read_tb_s)
        if graphs.last is not None:
            numbers["replay_share_of_bandwidth"] = _share(read_bytes, numbers["replay_ms"], read_tb_s)
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


def _goal(goal: float, measured: float, met: bool) -> Numbers:
    return {"goal": goal, "measured": measured, "met": met}
