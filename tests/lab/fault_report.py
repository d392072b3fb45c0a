"""`make faults`: every fault, then the soak; JSON and a table under benchmarks/."""

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.conditions import commit, conditions
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from tests.lab.drill import INTERVAL, NEXT_STEP_S, STEPS, Drill, supervised_config
from tests.lab.faults import FAULTS, Fault
from tests.lab.hosts import Lab
from tests.lab.soak import STEPS_PER_FAULT, is_sound, soak
from tests.lab.supervised import HANG_TIMEOUT_S, HOST_TIMEOUT_S
from tests.lab.wiring import obstacle, sweep
from tests.launch.runs import launch, losses

SOAK = "soak"
NAMES = [fault.name for fault in FAULTS]
RANKS = {"pipe2": 2, "pipe2_data2": 4}
SETTING = {
    "benchmark": "faults",
    "started_with": ["ssh", "srun"],
    "hang_timeout_s": HANG_TIMEOUT_S,
    "host_timeout_s": HOST_TIMEOUT_S,
    "steps": STEPS,
    "checkpoint_interval_steps": INTERVAL,
}
MEASURED = ("noticed_s", "next_step_s", "lost_steps", "newest_complete", "resumed_step", "orphans", "losses_equal",
            "stopped_s", "exit_code")  # fmt: skip
COLUMNS = ("fault", "start_with", "expected", *MEASURED, "wall_s")
LONGEST_TEXT = 2000


class Report:
    """The file that grows entry by entry, so that a stopped report continues where it was.

    Args:
        path: JSON; the table goes beside it. One that was measured in another setting is begun anew.
    """

    def __init__(self, path: Path):
        self._path = path
        self.body: dict[str, Any] = {"entries": [], SOAK: None, "preparing_s": 0.0}
        known = json.loads(path.read_text()) if path.exists() else {}
        if SETTING.items() <= known.items():
            self.body |= known

    def forget(self, faults: Collection[str]) -> None:
        """Drop entries, the soak too where it is among them, so that they are measured anew."""
        self.body["entries"] = [entry for entry in self.body["entries"] if entry["fault"] not in faults]
        if SOAK in faults:
            self.body[SOAK] = None
        if not self.body["entries"] and self.body[SOAK] is None:
            self.body["preparing_s"] = 0.0
        self.save()

    def has(self, fault: str) -> bool:
        """Whether this entry is there already, and was well."""
        return any((entry["fault"], entry["ok"]) == (fault, True) for entry in self.body["entries"])

    def put(self, entry: Mapping[str, Any]) -> None:
        """Add an entry in place of one of the same fault."""
        kept = [other for other in self.body["entries"] if other["fault"] != entry["fault"]]
        entries = [one for one in [*kept, dict(entry)] if one["fault"] in NAMES]
        entries.sort(key=lambda one: NAMES.index(one["fault"]))
        self.body["entries"] = entries
        self.save()

    def save(self) -> None:
        """Write JSON and table."""
        body = self.body
        measured = [*body["entries"], *([body[SOAK]] if body[SOAK] else [])]
        wall_s = body["preparing_s"] + sum(one["wall_s"] for one in measured)
        body |= conditions(None, 0) | SETTING | {"wall_s": round(wall_s, 1)}
        self._path.write_text(json.dumps(body, indent=1) + "\n")
        self._path.with_suffix(".md").write_text(markdown(body))


def markdown(body: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Faults and what follows",
        "",
        "Made by `make faults`: a supervised run over hosts in network namespaces of one machine "
        f"({body['hardware']}), {body['steps']} steps, a checkpoint every {body['checkpoint_interval_steps']} steps, "
        f"`--hang-timeout-s {body['hang_timeout_s']:g}`, `--host-timeout-s {body['host_timeout_s']:g}` (15 where a "
        f"link comes back). All of it took {body['wall_s'] / 60:.0f} minutes.{commits(body)}",
        "",
        "`noticed_s` counts from the fault, `next_step_s` from noticing, `stopped_s` from the fault to the end of the "
        "supervisor. `newest_complete` is the step of the newest complete checkpoint when the fault was planted, "
        "`resumed_step` the one from which the run continued, never an earlier one: a save under way may be complete "
        "by then. A run that stopped was started again by the same command after its cause had been removed; "
        "`losses_equal` compares all its losses with those of an undisturbed run, bit by bit (within 1e-5 with fewer "
        "replicas).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for entry in body["entries"]:
        cells = ["" if entry[column] is None else str(entry[column]) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    if failed := [entry for entry in body["entries"] if not entry["ok"]]:
        lines += ["", "## Not as expected", ""]
        lines += [f"- {one['fault']}: {first_line('; '.join(one['problems']))}" for one in failed]
    if body[SOAK]:
        shown = {key: value for key, value in body[SOAK].items() if key not in ("each", "hung_how")}
        lines += ["", "## Soak", "", *(f"- {key}: {json.dumps(value)}" for key, value in shown.items())]
    return "\n".join(lines) + "\n"


def commits(body: Mapping[str, Any]) -> str:
    """A sentence on what code the entries were measured with, where it was not the same for all."""
    entries: dict[str, list[str]] = {}
    for entry in body["entries"]:
        entries.setdefault(str(entry["commit"]), []).append(entry["fault"])
    if body[SOAK]:
        entries.setdefault(str(body[SOAK]["commit"]), []).append("the soak")
    if len(entries) < 2:
        return ""
    most, *others = sorted(entries, key=lambda one: -len(entries[one]))
    told = "; ".join(f"`{one[:8]}`: {', '.join(entries[one])}" for one in others)
    return f" Measured with commit `{most[:8]}`, except {told}."


def first_line(text: str) -> str:
    """Of a text that may be a complete output."""
    return next(iter(text.splitlines()), "")


def reference(base: Path, corpus: Path, grid: str, ranks: int, steps: int) -> dict[int, float]:
    """Losses of an undisturbed run on this machine."""
    folder = base / f"reference-{grid}-{steps}"
    folder.mkdir()
    run = launch(folder, supervised_config(corpus, grid, steps), ranks=ranks)
    assert run.wait(400) == 0, run.text()
    return losses(folder, "run")


def measured(fault: Fault, base: Path, corpus: Path, references: Any) -> dict[str, Any]:
    """An entry, also where the measurement itself fails: the report continues."""
    started = time.monotonic()
    entry: dict[str, Any] = {"fault": fault.name, "start_with": fault.start_with, "expected": fault.expected}
    try:
        with Lab(2, shared=[base]) as lab:
            entry = Drill(lab, fault, base, corpus, references).measure()
        if (entry["next_step_s"] or 0) > NEXT_STEP_S:
            entry["problems"].append(f"next step after {entry['next_step_s']} s")
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        entry |= dict.fromkeys(MEASURED) | {"problems": [text[:LONGEST_TEXT]]}
    entry |= {"ok": not entry["problems"], "commit": commit(), "wall_s": round(time.monotonic() - started, 1)}
    print(f"{'ok  ' if entry['ok'] else 'FAIL'} {entry['wall_s']:4.0f} s {entry}", flush=True)
    return entry


def measured_soak(base: Path, corpus: Path, number: int, seed: int) -> dict[str, Any]:
    """The summary of the soak."""
    started = time.monotonic()
    undisturbed = reference(base, corpus, "pipe2", RANKS["pipe2"], STEPS_PER_FAULT * number)
    with Lab(2, shared=[base]) as lab:
        found = soak(lab, base, corpus, undisturbed, number, seed)
    return found | {"commit": commit(), "wall_s": round(time.monotonic() - started, 1)}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.fault_report", description=__doc__)
    names = [*NAMES, SOAK]
    parser.add_argument("--faults", nargs="*", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--soak-faults", type=int, default=30, metavar="N", help="faults of the soak (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the soak's draw")
    parser.add_argument("--fresh", action="store_true", help="measure anew what the report has of these already")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/faults.json"), metavar="FILE")
    return parser.parse_args()


def measure_missing(report: Report, wanted: Iterable[Fault], base: Path, corpus: Path) -> None:
    """Every entry that the report lacks, and what it is compared with."""
    missing = [fault for fault in wanted if not report.has(fault.name)]
    started = time.monotonic()
    references = {grid: reference(base, corpus, grid, RANKS[grid], STEPS) for grid in {fault.grid for fault in missing}}
    report.body["preparing_s"] += round(time.monotonic() - started, 1)
    for fault in missing:
        report.put(measured(fault, base, corpus, references))


def main() -> int:
    """Exit code: 0 when every entry of the report is as expected."""
    arguments = parse_arguments()
    if problem := obstacle():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    sweep()
    report = Report(arguments.output)
    if arguments.fresh:
        report.forget(arguments.faults)
    wanted = [fault for fault in FAULTS if fault.name in arguments.faults]
    with tempfile.TemporaryDirectory(prefix="stagdist-faults-") as name:
        base = Path(name)
        library = Path(sysconfig.get_paths()["stdlib"])
        corpus = base / "stdlib"
        prepare([str(path) for path in sorted(library.glob("*.py"))[:40]], str(corpus), byte_tokenizer())
        measure_missing(report, wanted, base, corpus)
        found = report.body[SOAK]
        if SOAK in arguments.faults and (found is None or not is_sound(found)):
            report.body[SOAK] = measured_soak(base, corpus, arguments.soak_faults, arguments.seed)
            report.save()
    entries, found = report.body["entries"], report.body[SOAK]
    print(f"{sum(entry['ok'] for entry in entries)} of {len(entries)} entries are as expected: {arguments.output}")
    return 0 if all(entry["ok"] for entry in entries) and (found is None or is_sound(found)) else 1


if __name__ == "__main__":
    sys.exit(main())
