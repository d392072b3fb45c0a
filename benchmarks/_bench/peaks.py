"""Peak bytes of tensors, phase by phase, as torch sees them: its memory profiler on CPUs, its allocator on GPUs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from stagdist.parallel.device import on_cuda

PHASE = "stagdist phase "
Phases = Mapping[str, Callable[[], object]]
"""What to run, by name and in order."""


def peak_bytes(phases: Phases, device: str) -> dict[str, int]:
    """Run the phases; most bytes of tensors that were held at once in each.

    Args:
        phases: run once each; a tensor made in one may live on in the next.
        device: `cpu` counts tensors made since the first phase began, `cuda` all of the current GPU.
    """
    return _on_cuda(phases) if on_cuda(device) else _on_cpu(phases)


def _on_cuda(phases: Phases) -> dict[str, int]:
    peaks = {}
    for name, run in phases.items():
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
    return peaks


def _on_cpu(phases: Phases) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, run in phases.items():
            with record_function(PHASE + name):
                run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # Read as they come: torch's own tables of them take as much memory as a model.
    events: list[Any] = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name().startswith(PHASE)}
    peaks, held = dict.fromkeys(phases, 0), 0
    for moment, change in changes:
        held += change
        for name in phases:
            start, end = spans[PHASE + name]
            if start <= moment <= end:
                peaks[name] = max(peaks[name], held)
    return peaks
