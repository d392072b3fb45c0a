"""Signs of life of one rank: the step and the phase it is in, in a small file that a watcher on the host reads.

Writing takes about a microsecond and needs no reader. A rank that is killed or frozen leaves the
last sign; its age shows the watcher that the rank hangs.
"""

import faulthandler
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

PULSE_FILE = "STAGDIST_PULSE"
"""Variable that names the file; without it signs of life go nowhere."""

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank with a pulse write the Python stacks of all its threads to standard error."""

Item = TypeVar("Item")

_FORM = struct.Struct("=qqqqqq")  # count, first step, step, phase, time in ns, count again
_OF_A_STACK = ("Thread 0x", "Current thread 0x", '  File "', "  <no Python frame>", "  ...")


class Phase(IntEnum):
    """What a rank is busy with."""

    START = 0
    LOAD = 1
    FORWARD = 2
    BACKWARD = 3
    RECEIVE = 4
    SEND = 5
    UPDATE = 6
    STEP = 7
    EVALUATE = 8
    SAVE = 9
    EXPORT = 10

    @property
    def waits(self) -> bool:
        """Whether a rank in this phase may be kept waiting by another one."""
        return self in (Phase.RECEIVE, Phase.SEND, Phase.UPDATE)

    @property
    def slow(self) -> bool:
        """Whether minutes without a sign are normal."""
        return self in (Phase.START, Phase.SAVE, Phase.EXPORT)


@dataclass(frozen=True)
class Sign:
    """The latest sign of life of a rank.

    Attributes:
        count: signs so far; 0: the rank has not said anything yet.
        first_step: optimizer steps that were done when training began or was resumed; -1 before.
        step: optimizer steps done; -1 before training.
        phase: what it began last.
        age_s: seconds since then.
    """

    count: int
    first_step: int
    step: int
    phase: Phase
    age_s: float


class Pulse:
    """Gives signs of life.

    Args:
        path: file for them; None: there is no watcher.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._memory: mmap.mmap | None = None
        self._count = 0
        self._first_step = self._step = -1
        if path is not None:
            with path.open("r+b") as stream:
                self._memory = mmap.mmap(stream.fileno(), _FORM.size)
            faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True, chain=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Pulse":
        """The pulse that the watcher of this process asks for, if there is one."""
        name = environment.get(PULSE_FILE)
        pulse = cls(None if name is None else Path(name))
        pulse.beat(Phase.START)
        return pulse

    def beat(self, phase: Phase, step: int | None = None) -> None:
        """Say what begins now, and how many steps are done where that has changed."""
        if self._memory is None:
            return
        self._count += 1
        if step is not None:
            self._step = step
            self._first_step = step if self._first_step < 0 else self._first_step
        values = (self._count, self._first_step, self._step, int(phase), time.monotonic_ns(), self._count)
        self._memory[: _FORM.size] = _FORM.pack(*values)


def beating(pulse: Pulse, phase: Phase) -> Callable[[Sequence[Item], str], Iterator[Item]]:
    """What walks through a sequence and gives a sign of life at each item: (items, what is done) -> items."""

    def walk(items: Sequence[Item], what: str) -> Iterator[Item]:
        for item in items:
            pulse.beat(phase)
            yield item

    return walk


def stack_lines(lines: Iterable[str]) -> list[str]:
    """What DUMP_SIGNAL wrote, without other output: a rank that is let go for it may print meanwhile."""
    return [line for line in lines if line.startswith(_OF_A_STACK)]


class PulseReader:
    """The watcher's side; on the host of the rank, whose monotonic clock it shares.

    Args:
        path: file to make.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._latest = (0, -1, -1, int(Phase.START), time.monotonic_ns(), 0)
        path.write_bytes(_FORM.pack(*self._latest))

    def read(self) -> Sign:
        """The latest complete sign of life."""
        values = _FORM.unpack(self._path.read_bytes())
        if values[0] == values[-1]:  # else it is being written right now
            self._latest = values
        count, first_step, step, phase, then_ns, _ = self._latest
        return Sign(count, first_step, step, Phase(phase), (time.monotonic_ns() - then_ns) / 1e9)
