"""Many faults in one job, drawn at random, one after the other recovered from."""

import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab.drill import INTERVAL, largest_difference, supervised_config, times
from tests.lab.faults import reboot, truncate_newest
from tests.lab.hosts import Lab
from tests.lab.supervised import HANG_TIMEOUT_S, KILL, STOP, Supervised

STEPS_PER_FAULT = 40
"""Of the run's length: more than a fault takes, so that the run does not end before the last one."""

BLINK, BLINK_S = "link_blink", 3.0
TRUNCATE = "truncate_and_kill"
KINDS = ("kill_rank_0", "kill_rank_1", "freeze_rank_0", "freeze_rank_1", "reboot", TRUNCATE, BLINK)
# Connections need up to 6.4 s to come back after a blink, on a busy machine some more.
OPTIONS = ("--host-timeout-s", "15")


def soak(lab: Lab, base: Path, corpus: Path, reference: Mapping[int, float], number: int, seed: int) -> dict[str, Any]:
    """Disturb one run `number` times. Returns: the summary for the report."""
    draw = random.Random(seed)
    folder = base / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = Supervised(lab, folder, options=("--max-restarts", str(2 * number), *OPTIONS))
    run.start(supervised_config(corpus, "pipe2", STEPS_PER_FAULT * number))
    faults: list[dict[str, Any]] = []
    hung = ""
    try:
        for index in range(number):
            faults.append(disturb(run, draw))
            print(f"soak {index + 1}/{number}: {faults[-1]}", flush=True)
        run.call.wait(300)
    except (AssertionError, LookupError, OSError, ValueError) as error:  # something did not come in its time
        hung = f"{type(error).__name__}: {error}"
    return summary(run, faults, hung, reference) | {"seed": seed}


def disturb(run: Supervised, draw: random.Random) -> dict[str, Any]:
    """One fault, and what follows until the run trains again."""
    trained = max(run.wait_until_it_trains(), max(run.losses(), default=0))
    run.wait_for_step(trained + draw.randrange(5, 2 * INTERVAL))
    kind, resumes = draw.choice(KINDS), len(run.events("resume"))
    entry: dict[str, Any] = {"kind": kind, "planted_at_step": max(run.losses())}
    newest, planted = run.newest_checkpoint(), time.time()
    plant(run, kind)
    if kind == BLINK:
        return entry | undisturbed(run, planted)
    if kind == TRUNCATE:
        newest = run.newest_checkpoint()
    run.wait_for_event("resume", resumes + 1)
    run.wait_until_it_trains()
    entry |= times(run.events(), planted, time.time())
    lost = run.events("resume")[resumes]["step"] < newest
    return entry | {"checkpoint_lost": lost, "late": is_late(kind, entry["noticed_s"]), "disturbed": False}


def plant(run: Supervised, kind: str) -> None:
    """Do the damage."""
    if kind == TRUNCATE:
        truncate_newest(run)
    elif kind == "reboot":
        reboot(run)
    elif kind == BLINK:
        run.lab.cut("node2")
        time.sleep(BLINK_S)
        run.lab.restore("node2")
    else:
        run.signal_script(int(kind[-1]), KILL if kind.startswith("kill") else STOP)


def undisturbed(run: Supervised, planted: float) -> dict[str, Any]:
    """What follows a link that was gone for a moment: the attempt continues, and it is not taken for a fault."""
    run.wait_for_step(max(run.losses()) + INTERVAL)
    since = [event for event in run.events() if event["time"] >= planted]
    noticed = [event.get("says", "a new start") for event in since if event["event"] in ("fault", "start")]
    if noticed:
        run.wait_until_it_trains()
    entry = {"noticed_s": None, "next_step_s": None, "lost_steps": 0, "checkpoint_lost": False, "late": False}
    return entry | {"disturbed": bool(noticed), "says": noticed[0] if noticed else None}


def is_late(kind: str, noticed_s: float | None) -> bool:
    """Whether a fault was noticed, counted from its planting, later than it must be."""
    limits = {"freeze": HANG_TIMEOUT_S + 5, "kill": 5.0}
    limit_s = limits.get(kind.partition("_")[0], float("inf"))
    return noticed_s is None or noticed_s > limit_s


def summary(run: Supervised, faults: list[dict[str, Any]], hung: str, reference: Mapping[int, float]) -> dict[str, Any]:
    """Of all faults together."""
    return {
        "faults": len(faults),
        "kinds": dict(Counter(fault["kind"] for fault in faults)),
        "hung": int(bool(hung)),
        "hung_how": hung[:1000] or None,
        "checkpoints_lost": sum(fault["checkpoint_lost"] for fault in faults),
        "noticed_late": sum(fault["late"] for fault in faults),
        "disturbed_by_a_blink": sum(fault["disturbed"] for fault in faults),
        "noticed_s": spread([fault["noticed_s"] for fault in faults]),
        "next_step_s": spread([fault["next_step_s"] for fault in faults]),
        "lost_steps_max": max((fault["lost_steps"] or 0 for fault in faults), default=None),
        "orphans": len(run.orphans(2.0)),
        "exit_code": run.call.poll(),
        "losses_equal": largest_difference(run.losses(), reference) == 0.0,
        "each": faults,
    }


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median and maximum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "max": max(known)} if known else None


def is_sound(found: Mapping[str, Any]) -> bool:
    """Whether the summary of a soak is as it must be."""
    bad = ("hung", "orphans", "checkpoints_lost", "noticed_late", "disturbed_by_a_blink", "exit_code")
    return bool(found["losses_equal"]) and not any(found[name] for name in bad)
