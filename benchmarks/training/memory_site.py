"""One process of the memory benchmark: builds the engine, trains some steps, reports peaks of tensor bytes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.training.site import RankSite, random_batches
from stagdist.config.run_config import RunConfig
from stagdist.parallel.device import on_cuda
from stagdist.training.engine.section_engine import SectionEngine

PHASE = "stagdist phase "
Phases = Mapping[str, Callable[[], object]]
"""What to run, by name and in order."""


class MemorySite(RankSite):
    """A rank of `benchmarks/memory.py`; its data is random."""

    def __init__(self, config: RunConfig, settings: dict[str, Any]):
        super().__init__(config)
        self._config, self._steps = config, settings["steps"]

    def run(self, name: str, *, together: bool) -> dict[str, Any]:
        """Peaks of building the engine and of each step, and the number of parameters that the engine holds."""
        engines: list[SectionEngine] = []
        batches = random_batches(self._config, self.device)
        phases: dict[str, Callable[[], object]] = {"start": lambda: engines.append(self.engine(self._config))}
        phases |= {f"step {step}": lambda: engines[0].train_batch(batches) for step in range(1, self._steps + 1)}
        peaks = peak_bytes(phases, self.device)
        return {"peak_bytes": peaks, "parameters": sum(each.numel() for each in engines[0].module.parameters())}


def peak_bytes(phases: Phases, device: str) -> dict[str, int]:
    """Run each phase once; most bytes of tensors held at once in each.

    On a CPU, torch's memory profiler counts tensors made since the first phase began; on a GPU, torch's allocator
    counts all of the current device.
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
    # Read event by event: torch's own tables take as much memory as a model.
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
