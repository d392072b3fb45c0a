"""When the first launch of a kernel waits for the device, and which streams share a hardware queue."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.gpu.checks.setting import NEEDS_GPU, ImpossibleError, Numbers, Setting

CALIBRATION_CYCLES = 50_000_000
LONG_MS = 300.0
SHORT_MS = 30.0
STREAMS = 32
"""Streams of torch's pool."""
CHILD_S = 20.0


def loading(setting: Setting) -> Numbers:
    """Host time of the first launch ever of a kernel while another stream is busy, for lazy and eager loading.

    With lazy loading it is expected to last until the device is idle. If a receive that waits for a peer is what keeps
    the device busy, both wait forever.
    """
    numbers: Numbers = {}
    for mode in ("LAZY", "EAGER"):
        numbers[mode.lower()] = _in_child({"CUDA_MODULE_LOADING": mode}, _first_launch if setting.on_gpu else _nothing)
        setting.keep(numbers)
    if not setting.on_gpu:
        raise ImpossibleError(f"loading of kernels {NEEDS_GPU}")
    return numbers


def queues(setting: Setting) -> Numbers:
    """Streams that cannot run beside each other, by CUDA_DEVICE_MAX_CONNECTIONS."""
    numbers: Numbers = {}
    for connections in ("1", "8", "32"):
        variables = {"CUDA_DEVICE_MAX_CONNECTIONS": connections}
        blocked = _in_child(variables, _blocked_streams if setting.on_gpu else _nothing)
        if setting.on_gpu:
            groups = sharing_groups(blocked)
            numbers[connections] = {"queues": len(groups), "largest": max(map(len, groups)), "groups": groups}
        setting.keep(numbers)
    if not setting.on_gpu:
        raise ImpossibleError(f"hardware queues: {NEEDS_GPU}")
    return numbers


def sharing_groups(blocked: list[list[int]]) -> list[list[int]]:
    """Sets of streams that share a queue, from the streams that each one blocked while it was busy."""
    groups: list[set[int]] = []
    for stream, others in enumerate(blocked):
        together = {stream, *others}
        for group in [group for group in groups if group & together]:
            groups.remove(group)
            together |= group
        groups.append(together)
    return sorted(sorted(group) for group in groups)


def _in_child(variables: dict[str, str], measure: Callable[[], Any]) -> Any:
    """What `measure` returns in a process in which CUDA starts with these variables.

    A fork of this process, in which CUDA has not started, saves the import of torch.
    """
    context = multiprocessing.get_context("fork")
    theirs, ours = context.Pipe()
    child = context.Process(target=_child, args=(variables, measure, ours))
    child.start()
    ours.close()
    try:
        assert theirs.poll(CHILD_S), f"no result with {variables} after {CHILD_S:g} s"
        result = theirs.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"with {variables} the process ended with code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    return result


def _child(variables: dict[str, str], measure: Callable[[], Any], result: Connection) -> None:
    os.environ.update(variables)
    result.send(measure())


def _nothing() -> dict[str, str]:
    return {}


def _cycles_per_ms() -> float:
    torch.cuda._sleep(CALIBRATION_CYCLES)  # loads the kernel, and lets the clock rise
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.cuda._sleep(CALIBRATION_CYCLES)
    end.record()
    end.synchronize()
    return CALIBRATION_CYCLES / begin.elapsed_time(end)


def _first_launch() -> Numbers:
    values = torch.ones(64, 64, device="cuda:0")
    values.add_(1.0)  # a kernel that is loaded, to compare with
    side, per_ms = torch.cuda.Stream(), _cycles_per_ms()
    torch.cuda.synchronize()

    def launch_s(launch: Callable[[], object]) -> float:
        with torch.cuda.stream(side):
            torch.cuda._sleep(int(LONG_MS * per_ms))
        began = time.perf_counter()
        launch()
        elapsed = time.perf_counter() - began
        torch.cuda.synchronize()
        return elapsed

    loaded_s = launch_s(lambda: values.add_(1.0))
    first_s = launch_s(values.tril_)  # no other use of it, and compiled ahead, unlike torch.special's
    return {
        "loaded_kernel_s": loaded_s,
        "first_launch_s": first_s,
        "second_launch_s": launch_s(values.tril_),
        "first_launch_waits_for_the_device": first_s > 0.5e-3 * LONG_MS,
    }


def _blocked_streams() -> list[list[int]]:
    """For each stream the others whose kernel had not run while it was busy."""
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    values = torch.zeros(STREAMS, 64, device="cuda:0")
    values[0].add_(1.0)
    per_ms = _cycles_per_ms()
    blocked = []
    for busy in range(STREAMS):
        torch.cuda.synchronize()
        done = [torch.cuda.Event() for _ in streams]
        with torch.cuda.stream(streams[busy]):
            torch.cuda._sleep(int(SHORT_MS * per_ms))
            # What waits in the queue is this, not the kernel, which has left it.
            done[busy].record()
        for index, stream in enumerate(streams):
            if index != busy:
                with torch.cuda.stream(stream):
                    values[index].add_(1.0)
                    done[index].record()
        time.sleep(SHORT_MS / 2e3)
        late = [index for index, event in enumerate(done) if not event.query()]
        assert busy in late, "the device was not busy long enough"
        blocked.append([index for index in late if index != busy])
    return blocked
