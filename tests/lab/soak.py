"""Many faults in one job, drawn at random, one after the other recovered from."""

import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lab.faults import INTERVAL, REBOOT_S, largest_difference, supervised_config, times, truncate_newest
from tests.lab.hosts import Lab
from tests.lab.supervised import KILL, STOP, Supervised

SOAK_STEPS = 900
BLINK = "link_blink"
KINDS = ("kill_rank_0", "kill_rank_1", "freeze_rank_0", "freeze_rank_1", "reboot", "truncate_and_kill", BLINK)


def soak(lab: Lab, base: Path, corpus: Path, reference: Mapping[int, float], number: int, seed: int) -> dict[str, Any]:
    """Disturb one run `number` times. Returns: the summary for the report."""
    draw = random.Random(seed)
    folder = base / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = Supervised(lab, folder, options=("--max-restarts", str(2 * number)))
    run.start(supervised_config(corpus, "pipe2", SOAK_STEPS))
    faults: list[dict[str, Any]] = []
    hung = ""
    try:
        for index in range(number):
            faults.append(disturb(run, draw, sum(fault["kind"] != BLINK for fault in faults)))
            print(f"soak {index + 1}/{number}: {faults[-1]}", flush=True)
        run.call.wait(300)
    except AssertionError as error:  # something did not come in its time
        hung = str(error)
    return summary(run, faults, hung, reference) | {"seed": seed}


def disturb(run: Supervised, draw: random.Random, recovered: int) -> dict[str, Any]:
    """One fault, and what follows until the run trains again.

    Args:
        recovered: restarts so far.
    """
    resumed = run.wait_for_event("step", max(1, len(run.events("start"))))["step"]
    run.wait_for_step(resumed + draw.randrange(5, 2 * INTERVAL))
    kind = draw.choice(KINDS)
    planted, saved = time.time(), newest_saved(run)
    plant(run, kind)
    entry: dict[str, Any] = {"kind": kind, "planted_at_step": max(run.losses())}
    if kind == BLINK:
        return entry | {"noticed_s": None, "next_step_s": None, "lost_steps": 0, "checkpoint_lost": False}
    run.wait_for_event("resume", recovered + 2)
    run.wait_for_event("step", len(run.events("start")))
    resumed_at = run.events("resume")[-1]["step"]
    lost = kind != "truncate_and_kill" and resumed_at < saved
    return entry | times(run.events(), planted, time.time()) | {"checkpoint_lost": lost}


def plant(run: Supervised, kind: str) -> None:
    """Do the damage."""
    if kind == "truncate_and_kill":
        truncate_newest(run)
    elif kind == "reboot":
        run.lab.power_off("node2")
        time.sleep(REBOOT_S)
        run.lab.power_on("node2")
    elif kind == BLINK:
        run.lab.cut("node2")
        time.sleep(3)
        run.lab.restore("node2")
    else:
        run.signal_script(int(kind[-1]), KILL if kind.startswith("kill") else STOP)


def newest_saved(run: Supervised) -> int:
    """Step of the newest complete checkpoint."""
    complete = (run.run / "checkpoints").glob("step_*/complete.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in complete), default=0)


def summary(run: Supervised, faults: list[dict[str, Any]], hung: str, reference: Mapping[int, float]) -> dict[str, Any]:
    """Of all faults together."""
    noticed = [fault["noticed_s"] for fault in faults if fault["noticed_s"] is not None]
    next_step = [fault["next_step_s"] for fault in faults if fault["next_step_s"] is not None]
    return {
        "faults": len(faults),
        "kinds": dict(Counter(fault["kind"] for fault in faults)),
        "hung": int(bool(hung)),
        "hung_how": hung[:1000] or None,
        "checkpoints_lost": sum(fault["checkpoint_lost"] for fault in faults),
        "noticed_s": {"median": statistics.median(noticed), "max": max(noticed)},
        "next_step_s": {"median": statistics.median(next_step), "max": max(next_step)},
        "lost_steps_max": max(fault["lost_steps"] for fault in faults),
        "orphans": len(run.orphans(2.0)),
        "exit_code": run.call.poll(),
        "losses_equal": largest_difference(run.losses(), reference) == 0.0,
        "each": faults,
    }
