"""Faults to plant into forked ranks before their script runs (`before` of `tests.launch.runs.Forks`).

This module imports nothing heavy: every rank with a fault imports it.
"""

import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def slow_disk() -> None:
    """Let no save complete its files before training reaches the next save, and that of step 10 never."""
    _slow_down(_hang)


def slow_disk_that_breaks() -> None:
    """The same, and the writer of rank 1 fails at step 10."""
    _slow_down(_break)


def full_disk() -> None:
    """Limit the size of files: a write fails as on a full disk, and no mount is needed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30 * 1024, 30 * 1024))


def fast_clock() -> None:
    """Let time pass ten times as fast."""
    real = time.monotonic
    time.monotonic = lambda: 10 * real()


def only_rank_0() -> None:
    """Keep the other ranks from starting: a process group would wait for them."""
    if os.environ["RANK"] != "0":
        time.sleep(600)


def one_bit_of_rank_1() -> None:
    """Change the lowest bit of one weight of rank 1 before its eighth step."""
    import torch

    from stagdist.training.engine.section_engine import SectionEngine

    original = SectionEngine.train_batch

    def train_batch(engine: SectionEngine, *arguments: Any) -> torch.Tensor:
        if os.environ["RANK"] == "1" and engine.global_steps == 7:
            weight = engine.module.canonical_parameters()["head.weight"]
            weight.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return original(engine, *arguments)

    SectionEngine.train_batch = train_batch  # type: ignore[assignment]


def short_patience() -> None:
    """Wait only some seconds for an HTTP process that takes no message."""
    from stagdist.serving import http_child

    http_child.SEND_S = 3.0


def _slow_down(fault: Callable[[Path, threading.Event], None]) -> None:
    from stagdist.training.saving import background_write
    from stagdist.training.saving.save import Saver

    write, wait_for_earlier, next_save = background_write.write_fragments, Saver._wait_for_earlier, threading.Event()

    def slow(path: Path, fragments: Any, given_up: threading.Event) -> Any:
        record = write(path, fragments, given_up)
        while not next_save.is_set() and not given_up.wait(0.01):
            pass
        fault(path, given_up)
        return record

    def begin_next(self: Saver, step: int) -> None:
        next_save.set()
        wait_for_earlier(self, step)
        next_save.clear()

    background_write.write_fragments = slow  # type: ignore[assignment]
    Saver._wait_for_earlier = begin_next  # type: ignore[assignment, method-assign]


def _hang(path: Path, given_up: threading.Event) -> None:
    if path.parent.name == "step_00000010":
        given_up.wait()


def _break(path: Path, given_up: threading.Event) -> None:
    if os.environ["RANK"] == "1" and path.parent.name == "step_00000010":
        raise ZeroDivisionError
