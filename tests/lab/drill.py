"""One fault planted in one supervised run, and what follows: an entry of the report."""

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.faults import Fault
from tests.lab.hosts import Lab
from tests.lab.launching import GRIDS, run_config
from tests.lab.supervised import HANG_TIMEOUT_S, Supervised
from tests.launch.runs import PRETRAIN

STEPS = 120
"""Many more than FAULT_STEP: the run must still train when the fault comes, however late a busy machine plants it."""

INTERVAL = 10
NEXT_STEP_S = 30.0
"""Seconds from noticing to the next step, on an idle machine."""

END_S = 300.0
POISONED = Path(__file__).resolve().parent / "poisoned" / "pretrain.py"


@dataclass
class Drill:
    """One fault.

    Attributes:
        fault: planted once.
        base: folder that the hosts share.
        corpus: prefix of the corpus.
        reference: losses by step of the undisturbed run, by grid.
    """

    lab: Lab
    fault: Fault
    base: Path
    corpus: Path
    reference: Mapping[str, Mapping[int, float]]
    run: Supervised = field(init=False)

    def __post_init__(self) -> None:
        fault = self.fault
        folder = (self.lab.disk if fault.on_disk else self.base) / fault.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if fault.spare and "node3" not in self.lab.hosts:
            self.lab.add_host()
        self.run = Supervised(
            self.lab,
            folder,
            fault.start_with,
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
        planted, truth = self._plant()
        code = self._end()
        stopped = time.time()
        orphans = run.orphans(fault.ending_s)
        entry: dict[str, Any] = {"fault": fault.name, "start_with": fault.start_with, "expected": fault.expected}
        entry |= times(run.events(), planted, stopped) | {"orphans": len(orphans)}
        last_line = (run.call.text().strip().splitlines() or [""])[-1]
        if fault.expected == "stop" and code is not None:
            self._start_again(config)
        difference = largest_difference(run.losses(), self.reference[fault.grid])
        entry |= {"losses_equal": difference <= fault.tolerance, "largest_difference": difference}
        entry |= truth | {"resumed_step": resumed_step(run.events(), planted)}
        entry |= {"exit_code": code, "last_line": last_line, "hung": code is None}
        return entry | {"problems": problems(fault, entry)}

    def _plant(self) -> tuple[float, dict[str, int]]:
        """Wait for the moment, plant the fault. Returns: when; how far the run was, its newest complete checkpoint."""
        fault, run = self.fault, self.run
        if fault.at_step is None:
            run.wait_for_script(0)
        else:
            run.wait_for_step(fault.at_step)
        truth = {"planted_at_step": max(run.losses(), default=0), "newest_complete": run.newest_checkpoint()}
        planted = time.time()
        fault.plant(run)
        if fault.damages_newest:
            truth["newest_complete"] = run.newest_checkpoint()
        return planted, truth

    def _end(self) -> int | None:
        try:
            return self.run.call.wait(END_S)
        except AssertionError:
            return None

    def _start_again(self, config: dict[str, Any]) -> None:
        """As a person would, by the same command."""
        with contextlib.suppress(FileNotFoundError):
            self.fault.mend(self.run)
        self.run.start(config)
        assert self.run.call.wait(END_S) == 0, self.run.call.text()


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


def resumed_step(events: list[dict[str, Any]], planted: float) -> int | None:
    """The earliest step from which the run was resumed since then, by itself or by hand; None where it never was."""
    steps = [event["step"] for event in events if event["event"] == "resume" and event["time"] >= planted]
    return min(steps, default=None)


def largest_difference(found: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Between the losses of two runs; infinite where steps are missing."""
    if set(found) != set(reference):
        return float("inf")
    return max(abs(found[step] - reference[step]) for step in reference)


def problems(fault: Fault, entry: Mapping[str, Any]) -> list[str]:
    """What of an entry is not as it must be, also on a busy machine; empty when all is well."""
    found = [*_problems_of_the_end(fault, entry), *_problems_of_resuming(fault, entry)]
    if entry["planted_at_step"] > STEPS - 2 * INTERVAL:
        found.append(f"planted at step {entry['planted_at_step']}, when the run had all but ended")
    if (entry["noticed_s"] is not None) != fault.noticed:
        found.append(f"noticed after {entry['noticed_s']}")
    if "kill" in fault.name and fault.noticed and (entry["noticed_s"] or 0) > 5:
        found.append("a dead rank must be noticed within 5 s")
    if fault.name.startswith("freeze") and (entry["noticed_s"] or 0) > HANG_TIMEOUT_S + 5:
        found.append("a frozen rank must be noticed within the time of a hang and 5 s")
    return found


def _problems_of_the_end(fault: Fault, entry: Mapping[str, Any]) -> list[str]:
    found = []
    if entry["hung"] or entry["orphans"]:
        found.append(f"hung {entry['hung']}, orphans {entry['orphans']}")
    if not entry["losses_equal"]:
        found.append(f"losses differ by {entry['largest_difference']}")
    if (entry["exit_code"] == 0) != (fault.expected == "recover"):
        found.append(f"exit code {entry['exit_code']}")
    if fault.expected == "stop" and entry["exit_code"] == 1 and not entry["last_line"].startswith("error: "):
        found.append(f"no clear last line: {entry['last_line']}")
    return found


def _problems_of_resuming(fault: Fault, entry: Mapping[str, Any]) -> list[str]:
    resumed, newest = entry["resumed_step"], entry["newest_complete"]
    if resumed is None:
        return ["it was never resumed"] if fault.noticed or fault.expected == "stop" else []
    return [f"resumed at step {resumed}, before its newest checkpoint of step {newest}"] if resumed < newest else []
