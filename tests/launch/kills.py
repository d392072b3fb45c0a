"""Kill all ranks of one run at random moments of its saves, again and again; no published checkpoint may be lost.

    python -m tests.launch.kills --kills 200 --output benchmarks/results/kills.json

The run saves after every step. Each start must resume from the newest checkpoint that was seen before the kill, or from
a later one, and must repeat the losses that were logged before.
"""

import argparse
import json
import platform
import random
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.conditions import commit
from stagdist.checkpoint.training.directory import candidates, checkpoint_damage
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from tests.launch.runs import Forks, losses, pretrain, tiny_config

MODEL = {"hidden_size": 128, "intermediate_size": 512, "section_layers": [2, 2]}
LONGEST_S = 1.0
"""Longest time that a start trains before it is killed; a step and its save take about 0.1 s."""


@dataclass
class KillReport:
    """What happened.

    Attributes:
        kills: of all ranks.
        while_saving: kills at which a save was under way.
        steps: the newest checkpoint after every kill.
        lost: a line for every checkpoint that was lost or damaged, and for every loss that was not repeated.
    """

    kills: int = 0
    while_saving: int = 0
    steps: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def kill_often(folder: Path, corpus: Path, kills: int, seed: int) -> KillReport:
    """Start the run and kill it, `kills` times."""
    checkpoints = folder / "runs/run/checkpoints"
    training = {"steps": 20_000, "global_batch_size": 2, "micro_batch_size": 2}
    config = tiny_config(
        corpus, "run", model=MODEL, training=training, checkpoint={"interval_steps": 1, "keep_last": 2}
    )
    config["evaluation"] = {"interval_steps": 0}
    generator, report, logged = random.Random(seed), KillReport(), dict[int, float]()
    for number in range(kills):
        newest = report.steps[-1] if report.steps else 0
        run = _training(folder, config, newest)
        time.sleep(generator.uniform(0, LONGEST_S))
        seen = _newest_name(checkpoints)
        report.while_saving += (checkpoints / ".saving").exists()
        run.end()
        report.kills += 1
        report.steps.append(_newest_name(checkpoints))
        if report.steps[-1] < seen:
            report.lost.append(f"kill {number}: step {seen} was published, {report.steps[-1]} is the newest")
        found = candidates(checkpoints)  # none if the first kill comes before the first save is complete
        if found and (reason := checkpoint_damage(found[0])):
            report.lost.append(f"kill {number}: {reason}")
        now = losses(folder, "run")
        report.lost += [
            f"kill {number}: loss of step {step} was {logged[step]}, is {now[step]}"
            for step in sorted(logged.keys() & now.keys())
            if logged[step] != now[step]
        ]
        logged |= now
    return report


def _training(folder: Path, config: dict[str, Any], newest: int) -> Forks:
    """Start the run; returns once it trains from where it should."""
    run = pretrain(folder, config)
    if newest == 0:
        run.wait_for_step(folder / "runs/run/metrics.jsonl", 2)
    else:
        resumed = f"resumed from runs/run/checkpoints/step_{newest:08d}"
        run.wait_until(lambda: resumed in run.text(), resumed)
    return run


def _newest_name(checkpoints: Path) -> int:
    """The step in the name of the newest checkpoint; 0 if there is none."""
    found = candidates(checkpoints)
    return int(found[0].name.removeprefix("step_")) if found else 0


def main() -> int:
    """Exit code 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="kills of all ranks (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON to write")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder, library = Path(name), Path(sysconfig.get_paths()["stdlib"])
        prepare([str(path) for path in sorted(library.glob("*.py"))[:40]], str(folder / "corpus"), byte_tokenizer())
        report = kill_often(folder, folder / "corpus", arguments.kills, arguments.seed)
    body = {"commit": commit(), "machine": platform.machine(), "seconds": time.monotonic() - started, **asdict(report)}
    if arguments.output:
        arguments.output.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{report.kills} kills, {report.while_saving} while a save was under way, {len(report.lost)} losses")
    print("\n".join(report.lost), file=sys.stderr, end="\n" if report.lost else "")
    return 1 if report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
