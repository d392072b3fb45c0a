"""Which kernels a decode step runs, and how many for each layer, with Triton kernels and without."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from stagdist.config.parts import ModelConfig
from tests.gpu.checks.models import (
    SEQUENTIAL,
    SHAPES,
    SHARED,
    STAGGERED,
    WITH,
    WITHOUT,
    Decoder,
    kernel_ways,
    shape,
    watched_graphs,
)
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting, goal
from tests.gpu.checks.timing import wait

REPLAYS = 5
SHOWN = 20
LAYERS_GOAL = 8
DEPTHS = (1, 3)
"""Layers of a section in the two models whose difference gives the launches of a layer."""


def kernels(setting: Setting) -> Numbers:
    """Kernels of a step of each shape, by name, and launches per layer: kernels, copies and fills."""
    names = tuple(SHAPES) if setting.on_gpu else (SHARED,)
    numbers: Numbers = {name: {} for name in names}
    for way, use_kernels in kernel_ways(setting).items():
        for name in names:
            model = shape(setting, name)
            numbers[name][way] = _step(setting, model, use_kernels)[0]
            numbers[name][way]["launches_per_layer"] = _per_layer(setting, model, use_kernels)
            if name == STAGGERED and SEQUENTIAL in names:  # a mean of both sections; the first is SEQUENTIAL
                mean, first = (numbers[each][way]["launches_per_layer"] for each in (STAGGERED, SEQUENTIAL))
                numbers[name][way]["launches_per_layer"] = 2 * mean - first
            setting.keep(numbers)
    judged = WITH if setting.on_gpu else WITHOUT
    most = max(numbers[name][judged]["launches_per_layer"] for name in names)
    numbers["goals"] = {"launches per layer, most of any shape": goal(setting, LAYERS_GOAL, most, most <= LAYERS_GOAL)}
    if not setting.on_gpu:
        numbers["impossible"] = {"names of kernels": f"{NEEDS_GPU}; these are operators of a request"}
    return numbers


def _per_layer(setting: Setting, model: ModelConfig, use_kernels: bool | None) -> float:
    """Launches of a layer, those of cross-attention included; a layer of batched sections runs once for all of them."""
    launches = []
    for depth in DEPTHS:
        layers = {"section_layers": (depth,) * model.num_sections}
        numbers, passes = _step(setting, model.model_copy(update=layers), use_kernels)
        launches.append(sum(numbers[f"{kind}_per_step"] for kind in ("kernels", "copies", "fills")))
    return float((launches[1] - launches[0]) / (passes * (DEPTHS[1] - DEPTHS[0])))


def _step(setting: Setting, model: ModelConfig, use_kernels: bool | None) -> tuple[Numbers, int]:
    """Profile a step; also how many sections run one after the other."""
    prompt, new_tokens = (500, 8) if setting.on_gpu else (4, 2)
    with watched_graphs() as graphs:
        decoder = Decoder(setting, model, kernels=use_kernels)
        passes = 1 if decoder.stage.topology.batched else model.num_sections
        decoder.run(prompt, new_tokens)
        work: Callable[[], Any] = partial(decoder.run, prompt, new_tokens)
        repeats = 1
        if graphs.last is not None:
            work, repeats = graphs.last.replay, REPLAYS
        numbers = _by_name(profiled(setting, work, repeats), repeats)
        del work
        graphs.last = None
    decoder.close()
    return numbers, passes


def profiled(setting: Setting, work: Callable[[], Any], repeats: int = 1) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel, copy and fill that `work` runs; of every operator itself on a CPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * setting.on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            work()
        wait(setting.device)
    events = profiler.events() or []
    if not setting.on_gpu:
        return [(event.name, event.self_cpu_time_total) for event in events]
    return [
        (event.name, event.time_range.elapsed_us())
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def _by_name(events: list[tuple[str, float]], repeats: int) -> Numbers:
    times: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in events:
        times[name].append(microseconds)
    copies, fills = (sum(name.startswith(kind) for name, _ in events) for kind in ("Memcpy", "Memset"))
    most = sorted(times, key=lambda name: -sum(times[name]))[:SHOWN]
    return {
        "kernels_per_step": (len(events) - copies - fills) / repeats,
        "copies_per_step": copies / repeats,
        "fills_per_step": fills / repeats,
        "us_per_step": sum(microseconds for _, microseconds in events) / repeats,
        "names": [
            {"name": name, "count": len(times[name]) / repeats, "us": sum(times[name]) / repeats} for name in most
        ],
    }
