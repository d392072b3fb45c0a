"""Which kernels a decode step runs, and how fast the products of one row are."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.gpu.checks.models import SHAPES, SHARED, Decoder, shape, watched_graphs
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting
from tests.gpu.checks.timing import device_ms, wait

REPLAYS = 5
SHOWN = 40


def kernels(setting: Setting) -> Numbers:
    """Kernels of a step of each shape, by name, and the bandwidth of its matrix-vector products, by shape."""
    numbers: Numbers = {}
    prompt, new_tokens = (500, 8) if setting.on_gpu else (4, 2)
    for name in SHAPES:
        with watched_graphs() as graphs:
            decoder = Decoder(setting, shape(setting, name), graphs=True)
            decoder.run(prompt, new_tokens)
            if graphs.last is None:
                numbers[name] = _by_name(profiled(setting, partial(decoder.run, prompt, new_tokens)), 1)
            else:
                numbers[name] = _by_name(profiled(setting, graphs.last.replay, REPLAYS), REPLAYS)
            graphs.last = None
        # Sections that share their weights are rows of one product.
        numbers[name]["products"] = _products(setting, decoder, rows=2 if name == SHARED else 1)
        decoder.close()
        setting.keep(numbers)
    if not setting.on_gpu:
        numbers["impossible"] = {"names of kernels": f"{NEEDS_GPU}; these are operators of a whole request"}
    return numbers


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


def _products(setting: Setting, decoder: Decoder, rows: int) -> Numbers:
    """Microseconds and TB/s of x W^T for every shape of W, over all the weights of that shape in turn."""
    weights: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for weight in decoder.stage.weights.tensors():
        if weight.ndim == 2:
            weights[f"{rows} x {weight.shape[1]} x {weight.shape[0]}"][weight.data_ptr()] = weight
    return {name: _product(setting, list(matrices.values()), rows) for name, matrices in weights.items()}


def _product(setting: Setting, matrices: list[torch.Tensor], rows: int) -> Numbers:
    row = torch.randn(rows, matrices[0].shape[1], device=setting.device, dtype=matrices[0].dtype)

    def multiply() -> None:
        for matrix in matrices:
            F.linear(row, matrix)

    work: Callable[[], Any] = multiply
    if setting.on_gpu:  # as a graph: launches one by one take longer than the small products
        multiply()
        wait(setting.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply()
        work = graph.replay
    milliseconds = device_ms(setting.device, work) / len(matrices)
    return {
        "matrices": len(matrices),
        "us": 1e3 * milliseconds,
        "tb_s": matrices[0].nbytes / milliseconds / 1e9,
    }
