"""The faults that a supervised run must survive, or end from in order: how each is planted, and what must follow."""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.lab.hosts import Lab
from tests.lab.launching import GRIDS, run_config
from tests.lab.supervised import HANG_TIMEOUT_S, KILL, STOP, TERM, Supervised
from tests.launch.runs import PRETRAIN

STEPS = 150
INTERVAL = 10
FAULT_STEP = 33
LAUNCHERS = ("pdsh", "openmpi", "torchrun")
NEXT_STEP_S = 30.0
"""Seconds from noticing to the next step, on an idle machine."""

POISONED = Path(__file__).resolve().parent / "poisoned" / "pretrain.py"
REBOOT_S = 6.0
ENDING_S = 30.0
"""Seconds for ranks to save and end by themselves once the supervisor is gone, or their link for good."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: in the report.
        expected: whether the run goes on by itself.
        plant: does the damage.
        mend: what a person does before starting a stopped run again.
        options: of the supervisor.
        spare: whether a third host stands by.
        grid: of the run.
        tolerance: of losses against an undisturbed run; 0: to the last bit.
        noticed: whether a fault is noticed at all.
        lost_limit: steps that may be lost: those since the newest whole checkpoint, a save in flight included.
        on_disk: the run lives on the small disk.
        own_corpus: the run has a copy of the corpus.
        poisoned: the script can be made to see bad losses.
    """

    name: str
    expected: Literal["recover", "stop"]
    plant: Callable[[Supervised], None]
    mend: Callable[[Supervised], None] = lambda run: None
    options: tuple[str, ...] = ()
    spare: bool = False
    grid: str = "pipe2"
    tolerance: float = 0.0
    noticed: bool = True
    lost_limit: int = 2 * INTERVAL - 1
    on_disk: bool = False
    own_corpus: bool = False
    poisoned: bool = False


def _kill(rank: int) -> Callable[[Supervised], None]:
    return lambda run: run.signal_script(rank, KILL)


def _blink(run: Supervised) -> None:
    run.lab.cut("node2")
    time.sleep(5)
    run.lab.restore("node2")


def _reboot(run: Supervised) -> None:
    run.lab.power_off("node2")
    time.sleep(REBOOT_S)
    run.lab.power_on("node2")


def truncate_newest(run: Supervised) -> None:
    """Kill a rank and cut the largest file of the newest checkpoint in half."""
    run.signal_script(1, KILL)
    newest = max(path.parent for path in (run.run / "checkpoints").glob("step_*/complete.json"))
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as stream:
        stream.truncate(largest.stat().st_size // 2)


def _delete_corpus(run: Supervised) -> None:
    for path in run.folder.glob("corpus.*"):
        path.rename(path.with_name(f"gone-{path.name}"))
    run.signal_script(1, KILL)


def _bring_corpus_back(run: Supervised) -> None:
    for path in run.folder.glob("gone-corpus.*"):
        path.rename(path.with_name(path.name.removeprefix("gone-")))


def _poison(how: str) -> Callable[[Supervised], None]:
    def plant(run: Supervised) -> None:
        part = run.folder / "poison.part"
        part.write_text(how)
        part.rename(run.folder / "poison")

    return plant


FAULTS = (
    Fault("kill_rank_0", "recover", _kill(0)),
    Fault("kill_rank_1", "recover", _kill(1)),
    Fault("freeze_rank", "recover", lambda run: run.signal_script(1, STOP)),
    Fault("link_down_5s", "recover", _blink, noticed=False),
    Fault("link_down_spare", "recover", lambda run: run.lab.cut("node2"), spare=True),
    Fault(
        "link_down_no_spare",
        "stop",
        lambda run: run.lab.cut("node2"),
        lambda run: run.lab.restore("node2"),
        options=("--host-wait-s", "5"),
    ),
    Fault("power_off_spare", "recover", lambda run: run.lab.power_off("node2"), spare=True),
    Fault(
        "power_off_fewer_replicas",
        "recover",
        lambda run: run.lab.power_off("node2"),
        options=("--min-data-parallel", "1"),
        grid="pipe2_data2",
        tolerance=1e-5,
    ),
    Fault("power_off_reboot", "recover", _reboot),
    Fault("sigterm_supervisor", "stop", lambda run: run.signal_supervisor(TERM), noticed=False),
    Fault("sigkill_supervisor", "stop", lambda run: run.signal_supervisor(KILL), noticed=False),
    Fault(
        "disk_full",
        "stop",
        lambda run: run.lab.fill_disk(20_000),
        lambda run: run.lab.free_disk(),
        on_disk=True,
    ),
    Fault("checkpoint_truncated", "recover", truncate_newest, lost_limit=3 * INTERVAL - 1),
    Fault("loss_not_finite_once", "recover", _poison("once"), poisoned=True),
    Fault(
        "loss_not_finite_always",
        "stop",
        _poison("always"),
        lambda run: (run.folder / "poison").unlink(),
        poisoned=True,
    ),
    Fault("corpus_deleted", "stop", _delete_corpus, _bring_corpus_back, own_corpus=True),
)


@dataclass
class Drill:
    """One fault under one launcher.

    Attributes:
        fault: planted once.
        launcher: of the supervisor.
        base: folder that the hosts share.
        corpus: prefix of the corpus.
        reference: losses by step of the undisturbed run, by grid.
    """

    lab: Lab
    fault: Fault
    launcher: str
    base: Path
    corpus: Path
    reference: Mapping[str, Mapping[int, float]]
    run: Supervised = field(init=False)

    def __post_init__(self) -> None:
        fault = self.fault
        folder = (self.lab.disk if fault.on_disk else self.base) / f"{fault.name}-{self.launcher}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if fault.spare and "node3" not in self.lab.hosts:
            self.lab.add_host()
        self.run = Supervised(
            self.lab,
            folder,
            self.launcher,
            slots=GRIDS[fault.grid].slots,
            spares=("node3",) if fault.spare else (),
            options=fault.options,
            script=POISONED if fault.poisoned else PRETRAIN,
            variables={"STAGDIST_TEST_POISON": str(folder / "poison")} if fault.poisoned else {},
        )

    def config(self) -> dict[str, Any]:
        """Of the run."""
        corpus = self.corpus
        if self.fault.own_corpus:
            for path in corpus.parent.glob(f"{corpus.name}.*"):
                shutil.copy(path, self.run.folder / path.name.replace(corpus.name, "corpus"))
            corpus = self.run.folder / "corpus"
        return supervised_config(corpus, self.fault.grid)

    def measure(self) -> dict[str, Any]:
        """Plant the fault and see what follows: an entry of the report."""
        fault, run = self.fault, self.run
        config = self.config()
        run.start(config)
        run.wait_for_step(FAULT_STEP)
        planted = time.time()
        fault.plant(run)
        hung = False
        try:
            code: int | None = run.call.wait(240)
        except AssertionError:
            hung, code = True, None
        stopped = time.time()
        orphans = run.orphans(ENDING_S if fault.expected == "stop" else 2.0)
        entry: dict[str, Any] = {"fault": fault.name, "launcher": self.launcher, "expected": fault.expected}
        entry |= times(run.events(), planted, stopped) | {"orphans": len(orphans)}
        last_line = (run.call.text().strip().splitlines() or [""])[-1]
        if fault.expected == "stop" and not hung:
            with contextlib.suppress(FileNotFoundError):
                fault.mend(run)
            run.start(config)  # the same command goes on from the newest checkpoint, so that was whole
            assert run.call.wait(240) == 0, run.call.text()
        difference = largest_difference(run.losses(), self.reference[fault.grid])
        entry |= {"losses_equal": difference <= fault.tolerance, "largest_difference": difference, "exit_code": code}
        entry |= {"last_line": last_line, "hung": hung}
        entry["ok"] = not problems(fault, entry) and (entry["next_step_s"] or 0) <= NEXT_STEP_S
        return entry


def supervised_config(corpus: Path, grid: str, steps: int = STEPS) -> dict[str, Any]:
    """A run whose checkpoints come every INTERVAL steps, and that ends at the first bad loss."""
    config = run_config(corpus, grid, steps)
    config["checkpoint"] = {"interval_steps": INTERVAL, "keep_last": 3}
    config["training"]["max_bad_steps"] = 0
    return config


def times(events: list[dict[str, Any]], planted: float, stopped: float) -> dict[str, Any]:
    """What the history says of a fault planted at a time: seconds, steps."""
    after = [event for event in events if event["time"] >= planted]
    fault = next((event for event in after if event["event"] == "fault"), None)
    resumes = [event for event in after if event["event"] == "resume"]
    step = next(
        (event for event in after if event["event"] == "step" and resumes and event["time"] > resumes[0]["time"]), None
    )
    noticed = fault["noticed"] if fault else None
    return {
        "noticed_s": round(noticed - planted, 2) if noticed else None,
        "next_step_s": round(step["time"] - noticed, 2) if step and noticed else None,
        "lost_steps": resumes[0]["lost_steps"] if resumes else None if fault else 0,
        "stopped_s": round(stopped - planted, 2),
        "says": fault["says"] if fault else None,
    }


def largest_difference(found: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Between the losses of two runs; infinite where steps are missing."""
    if set(found) != set(reference):
        return float("inf")
    return max(abs(found[step] - reference[step]) for step in reference)


def problems(fault: Fault, entry: Mapping[str, Any]) -> list[str]:
    """What of an entry is not as it must be, also on a busy machine; empty when all is well."""
    found = []
    if entry["hung"] or entry["orphans"]:
        found.append(f"hung {entry['hung']}, orphans {entry['orphans']}")
    if not entry["losses_equal"]:
        found.append(f"losses differ by {entry['largest_difference']}")
    if (entry["exit_code"] == 0) != (fault.expected == "recover"):
        found.append(f"exit code {entry['exit_code']}")
    if (entry["noticed_s"] is not None) != fault.noticed:
        found.append(f"noticed after {entry['noticed_s']}")
    if fault.name.startswith("kill") and (entry["noticed_s"] or 0) > 5:
        found.append("a dead rank must be noticed within 5 s")
    if fault.name.startswith("freeze") and (entry["noticed_s"] or 0) > HANG_TIMEOUT_S + 5:
        found.append("a frozen rank must be noticed within the time of a hang and 5 s")
    if (entry["lost_steps"] or 0) > fault.lost_limit:
        found.append(f"{entry['lost_steps']} steps lost")
    if fault.expected == "stop" and entry["exit_code"] == 1 and not entry["last_line"].startswith("error: "):
        found.append(f"no clear last line: {entry['last_line']}")
    return found
