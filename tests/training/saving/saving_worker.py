"""The ranks of the tests of saving: save during training, with and without faults, and report."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from stagdist.checkpoint.complete import COMPLETE, damage, read_complete
from stagdist.checkpoint.training.directory import TrainingState
from stagdist.checkpoint.training.writer import OwnedFragment
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError
from stagdist.files import FileRecord
from stagdist.parallel.groups import Groups
from stagdist.training.engine.agreement import Writing
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.saving import background_write, save
from stagdist.training.saving.host_copies import HostCopies
from stagdist.training.saving.save import Saver, save_checkpoint
from tests.training.parity_cases import LEARNING_RATES, Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

TIMEOUT_S = 60.0
BROKEN_RANK = 1
HELD_S = 0.4


@dataclass
class SavingReport:
    """The results of one rank.

    Attributes:
        error: of the save that must fail, as text.
        votes: of this rank, one after the other.
        listed: entries of the checkpoints folder, sorted.
        most_at_once: files that were written at the same time.
        seconds: of the calls, by name.
        log: messages of `stagdist.training.saving.save`.
    """

    error: str = ""
    votes: list[Writing] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    most_at_once: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


class Rank:
    """One scenario on a rank: its own saver and folder, and the engine of the case."""

    def __init__(self, case: Case, groups: Groups, engine: SectionEngine, folder: Path):
        self.case, self.groups, self.engine = case, groups, engine
        self.config: RunConfig = case.config().model_copy(update={"runs_directory": str(folder)})
        self.saver, self.report = Saver(engine, groups, self.config), SavingReport()

    def train(self) -> None:
        """The steps of the case."""
        for rate, (tokens, labels) in zip(LEARNING_RATES, self.case.batches(), strict=True):
            self.engine.set_learning_rate(rate)
            self.engine.train_batch(micro_batches(self.case, self.groups, tokens, labels))

    def state(self, step: int) -> TrainingState:
        """A position in the run; only the step matters."""
        grid = self.groups.grid
        return TrainingState(step, 8 * step, 800, (grid.pipe, grid.data, grid.tensor))

    def timed(self, name: str, action: Callable[[], object]) -> None:
        """Run and record the seconds."""
        started = time.perf_counter()
        action()
        self.report.seconds[name] = time.perf_counter() - started

    def failing(self, action: Callable[[], object]) -> None:
        """Run an action that must fail on every rank."""
        try:
            action()
        except CheckpointError as error:
            assert error.everywhere
            self.report.error = str(error)

    def look(self) -> SavingReport:
        """The report, with the files that are on the disk now."""
        self.saver.close()
        dist.barrier(group=self.groups.control)
        checkpoints = Path(self.config.folder) / "checkpoints"
        self.report.listed = sorted(path.name for path in checkpoints.iterdir())
        for path in checkpoints.glob("step_*"):
            records = read_complete(path)
            assert damage(path, sorted(records), records) is None, f"{path / COMPLETE} does not match its files"
        dist.barrier(group=self.groups.control)
        return self.report


def run_scenarios(payload: tuple[list[Case], Path]) -> dict[str, SavingReport]:
    """Every scenario on a case's grid in one world; reports by the scenario's name. `payload`: cases, shared folder."""
    cases, folder = payload
    world, reports = World(TIMEOUT_S), {}
    for case in cases:
        groups = world.groups(case.grid)
        engine = build_engine(case.config(), groups)
        for number, (name, scenario) in enumerate(SCENARIOS.items()):
            rank = Rank(case, groups, engine, folder / case.name.replace(" ", "-") / name.replace(" ", "-"))
            if not number:
                rank.train()  # the moments are not zero; all scenarios have one engine
            with _logged(rank.report.log):
                scenario(rank)
            reports[f"{case.name}: {name}"] = rank.look()
    return reports


def same_content(rank: Rank) -> None:
    """A synchronous and an asynchronous save of the same moment, twice; training continues during the second."""
    for step in (1, 2):
        synchronous = rank.config.model_copy(update={"name": f"{rank.config.name}-synchronous"})
        save_checkpoint(rank.engine, rank.groups, synchronous, rank.state(step))
        release = threading.Event()
        with _held(rank.report, release):
            rank.saver.save(rank.state(step))
            rank.report.votes.append(rank.saver.vote())
            rank.train()  # changes every tensor in place
            release.set()
            rank.saver.finish()


def one_at_a_time(rank: Rank) -> None:
    """A save that is requested while the files of another one are written."""
    release = threading.Event()

    def second() -> None:
        threading.Timer(HELD_S, release.set).start()
        rank.saver.save(rank.state(2))

    with _held(rank.report, release):
        rank.timed("first", lambda: rank.saver.save(rank.state(1)))
        rank.timed("second", second)
        rank.timed("finish", rank.saver.finish)


def waited_for(rank: Rank) -> None:
    """`wait` and `asynchronous: false` complete the save before they return."""
    rank.saver.save(rank.state(1), wait=True)
    assert not rank.saver.under_way
    checkpoint = rank.config.checkpoint.model_copy(update={"asynchronous": False})
    Saver(rank.engine, rank.groups, rank.config.model_copy(update={"checkpoint": checkpoint})).save(rank.state(2))


def _with_broken_writer(error: Exception) -> Callable[[Rank], None]:
    def scenario(rank: Rank) -> None:
        rank.saver.save(rank.state(1), wait=True)

        def broken(path: Path, fragments: object, given_up: threading.Event) -> FileRecord:
            raise error

        if dist.get_rank() == BROKEN_RANK:
            with patch.object(background_write, "write_fragments", broken):
                rank.saver.save(rank.state(2))
                _wait_until(lambda: rank.saver.vote() is Writing.FAILED)
        else:
            with _held(rank.report, threading.Event()):  # must be abandoned, not waited for
                rank.saver.save(rank.state(2))
                _wait_until(lambda: rank.report.most_at_once == 1)
        rank.report.votes.append(rank.saver.vote())
        dist.barrier(group=rank.groups.control)
        rank.timed("finish", lambda: rank.failing(rank.saver.finish))

    return scenario


def no_memory(rank: Rank) -> None:
    """The copy to host memory fails on one rank."""

    def full(copies: HostCopies, numel: int, pinned: bool) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    rank.saver.save(rank.state(1), wait=True)
    if dist.get_rank() == BROKEN_RANK:
        with patch.object(HostCopies, "_make", full):
            rank.failing(lambda: rank.saver.save(rank.state(2)))
    else:
        rank.failing(lambda: rank.saver.save(rank.state(2)))


def not_shared(rank: Rank) -> None:
    """A rank has a disk of its own where the others share one."""
    if dist.get_rank() == BROKEN_RANK:
        own = rank.config.model_copy(update={"runs_directory": f"{rank.config.runs_directory}-of-its-own"})
        rank.saver = Saver(rank.engine, rank.groups, own)
    (Path(rank.config.folder) / "checkpoints").mkdir(parents=True, exist_ok=True)
    with patch.object(save, "VISIBLE_S", 0.5):  # it never becomes visible
        rank.failing(lambda: rank.saver.save(rank.state(1)))


def replaced_folder(rank: Rank) -> None:
    """Another run takes the folder of a save while its files are written."""
    rank.saver.save(rank.state(1), wait=True)
    rank.saver.save(rank.state(2))
    _wait_until(lambda: rank.saver.vote() is Writing.NONE)
    dist.barrier(group=rank.groups.control)
    if dist.get_rank() == 0:
        next(Path(rank.config.folder).glob("checkpoints/.saving/*/part_00001.safetensors")).unlink()
    rank.failing(rank.saver.finish)


SCENARIOS: dict[str, Callable[[Rank], None]] = {
    "same content": same_content,
    "one at a time": one_at_a_time,
    "waited for": waited_for,
    "disk full": _with_broken_writer(OSError(28, "No space left on device")),
    "writer broke": _with_broken_writer(ZeroDivisionError("planted")),
    "no memory": no_memory,
    "not shared": not_shared,
    "replaced folder": replaced_folder,
}


@contextmanager
def _held(report: SavingReport, release: threading.Event) -> Iterator[None]:
    """No file is written in the background before `release` is set; counts how many are written at once."""
    original, lock, now = background_write.write_fragments, threading.Lock(), [0]

    def held(path: Path, fragments: list[OwnedFragment], given_up: threading.Event) -> FileRecord:
        with lock:
            now[0] += 1
            report.most_at_once = max(report.most_at_once, now[0])
        try:
            while not (release.is_set() or given_up.is_set()):
                time.sleep(0.002)
            return original(path, fragments, given_up)
        finally:
            with lock:
                now[0] -= 1

    with patch.object(background_write, "write_fragments", held):
        yield


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def _logged(lines: list[str]) -> Iterator[None]:
    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("stagdist.training.saving.save"), Keep()
    logger.addHandler(handler)
    level: Any = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
