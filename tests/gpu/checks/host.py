"""What the host does for each token of a steady run: no call that waits for the device but one for a token before."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from stagdist.decode.runtime import stage
from stagdist.decode.runtime.graphs import StepGraphs
from stagdist.decode.runtime.outcome import HostBuffers, HostCopy, Outcome
from tests.gpu.checks.decode_speed import CHOICES, PARAMS
from tests.gpu.checks.models import COLD_TOKENS, SHARED, Decoder, shape
from tests.gpu.checks.setting import NEEDS_GPU, Numbers, Setting
from tests.gpu.checks.timing import wait

LAUNCH, EVENT_WAIT = "cudaGraphLaunch", "cudaEventSynchronize"
SYNCHRONIZING = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpy", "cudaMemcpy2D", "cudaMemset", "cudaMalloc",
    "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cuCtxSynchronize", "cuStreamSynchronize",
)  # fmt: skip
"""Calls that wait for the device, always or when memory is pageable."""


def host(setting: Setting) -> Numbers:
    """Calls of the CUDA runtime per token, and the order of launches and waits, for each way of choosing."""
    tokens = 48 if setting.on_gpu else COLD_TOKENS + 6
    numbers: Numbers = {}
    decoder = Decoder(setting, shape(setting, SHARED))
    for choice in CHOICES:
        decoder.run(8, tokens, **PARAMS[choice])
        with _runs_ahead(setting), _watched_steps() as steps:
            names = _runtime_calls(setting, decoder, tokens, PARAMS[choice])
        numbers[choice] = {"steps": sum(kind == "launch" for kind, _ in steps)}
        problems = out_of_order(steps)
        if setting.on_gpu:
            numbers[choice]["calls_per_token"] = calls = calls_per_token(names, skipped=COLD_TOKENS)
            problems += [f"{calls[name]:g} calls of {name} per token" for name in SYNCHRONIZING if name in calls]
            if calls.get(EVENT_WAIT) != 1:
                problems.append(f"{calls.get(EVENT_WAIT, 0):g} waits for an event per token, not 1")
        numbers[choice]["problems"] = problems
        setting.keep(numbers)
    decoder.close()
    found = {choice: each["problems"] for choice, each in numbers.items() if each["problems"]}
    assert not found, f"the host waits: {found}"
    if not setting.on_gpu:
        numbers["impossible"] = {"calls_per_token": NEEDS_GPU}
    return numbers


def calls_per_token(names: Sequence[str], skipped: int) -> dict[str, float]:
    """Calls between the launch of a step and that of the next one, by name, on average.

    Args:
        names: of all calls in their order.
        skipped: first steps that are not counted.
    """
    launches = [place for place, name in enumerate(names) if name == LAUNCH][skipped:]
    assert len(launches) > 1, f"{names.count(LAUNCH)} launches of a graph were seen, {skipped} of them not counted"
    counts = Counter(names[launches[0] : launches[-1]])
    return {name: count / (len(launches) - 1) for name, count in sorted(counts.items())}


def out_of_order(steps: Sequence[tuple[str, int]]) -> list[str]:
    """Waits for the token of a step before the next step was launched, the last one apart.

    Args:
        steps: ("launch", number of a step) and ("wait", number of a step), as they happened.
    """
    seen: set[tuple[str, int]] = set()
    last = max((number for kind, number in steps if kind == "launch"), default=-1)
    problems = []
    for kind, number in steps:
        if kind == "wait" and number < last and ("launch", number + 1) not in seen:
            problems.append(f"the host waited for token {number} before it launched step {number + 1}")
        seen.add((kind, number))
    if ("wait", last) not in seen:
        problems.append(f"no wait for token {last} was seen")
    return problems


@contextmanager
def _runs_ahead(setting: Setting) -> Iterator[None]:
    """A CPU launches steps ahead of their tokens inside, as a GPU does."""
    if setting.on_gpu:
        yield
        return
    with mock.patch.object(stage, "on_cuda", return_value=True):
        yield


@contextmanager
def _watched_steps() -> Iterator[list[tuple[str, int]]]:
    """Note every launch of a step and every wait for its tokens inside."""
    found: list[tuple[str, int]] = []
    launched, copied = itertools.count(), itertools.count()
    run, begin, wait_for = StepGraphs.run, HostBuffers.copy, HostCopy.wait
    of_step: dict[int, int] = {}  # by identity of the copy

    def noted_run(graphs: StepGraphs, *arguments: Any) -> None:
        found.append(("launch", next(launched)))
        run(graphs, *arguments)

    def noted_copy(buffers: HostBuffers, outcome: Outcome, step: int) -> HostCopy:
        made = begin(buffers, outcome, step)
        if outcome.step is not None:
            of_step[id(made)] = next(copied)
        return made

    def noted_wait(copy: HostCopy) -> Outcome:
        if id(copy) in of_step:
            found.append(("wait", of_step.pop(id(copy))))
        return wait_for(copy)

    with (
        mock.patch.object(StepGraphs, "run", noted_run),
        mock.patch.object(HostBuffers, "copy", noted_copy),
        mock.patch.object(HostCopy, "wait", noted_wait),
    ):
        yield found


def _runtime_calls(setting: Setting, decoder: Decoder, tokens: int, params: dict[str, Any]) -> list[str]:
    """Names of the CUDA calls of the host for a request, in their order; none on a CPU."""
    if not setting.on_gpu:
        decoder.run(8, tokens, **params)
        return []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        event = torch.cuda.Event()
        event.record()
        event.synchronize()  # so that the profile shows at least one wait, if it shows any
        decoder.run(8, tokens, **params)
        wait(setting.device)
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU]
    events.sort(key=lambda event: event.time_range.start)
    names = [event.name for event in events if event.name.startswith("cu")]
    assert EVENT_WAIT in names, f"the profile does not show waits for events, but {sorted(set(names))}"
    return names
