"""`make faults`: every fault under every launcher, then the soak; JSON and a table under benchmarks/."""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagdist.bench.conditions import conditions
from stagdist.data.prepare import prepare
from stagdist.data.tokenizer import byte_tokenizer
from tests.lab.faults import FAULTS, INTERVAL, LAUNCHERS, STEPS, Drill, supervised_config
from tests.lab.hosts import Lab
from tests.lab.soak import SOAK_STEPS, soak
from tests.lab.supervised import HANG_TIMEOUT_S, HOST_TIMEOUT_S
from tests.lab.wiring import obstacle, sweep
from tests.launch.runs import launch, losses

COLUMNS = (
    "fault", "launcher", "expected", "noticed_s", "next_step_s", "lost_steps", "orphans", "losses_equal", "stopped_s",
    "exit_code",
)  # fmt: skip


class Report:
    """The file that grows entry by entry, so that a stopped report goes on where it was."""

    def __init__(self, path: Path, fresh: bool):
        self._path = path
        self.body: dict[str, Any] = {"entries": [], "soak": None}
        if path.exists() and not fresh:
            self.body = json.loads(path.read_text())

    def has(self, fault: str, launcher: str) -> bool:
        """Whether this entry is there already, and was well."""
        entries = self.body["entries"]
        return any((entry["fault"], entry["launcher"], entry["ok"]) == (fault, launcher, True) for entry in entries)

    def put(self, entry: Mapping[str, Any]) -> None:
        """Add an entry in place of one of the same fault and launcher."""
        place = (entry["fault"], entry["launcher"])
        kept = [other for other in self.body["entries"] if (other["fault"], other["launcher"]) != place]
        order = [fault.name for fault in FAULTS]
        self.body["entries"] = sorted([*kept, dict(entry)], key=lambda one: order.index(one["fault"]))
        self.save()

    def save(self) -> None:
        """Write JSON and table."""
        self.body |= conditions(None, 0) | {
            "benchmark": "faults",
            "hang_timeout_s": HANG_TIMEOUT_S,
            "host_timeout_s": HOST_TIMEOUT_S,
            "steps": STEPS,
            "checkpoint_interval_steps": INTERVAL,
        }
        self._path.write_text(json.dumps(self.body, indent=1) + "\n")
        self._path.with_suffix(".md").write_text(markdown(self.body))


def markdown(body: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Faults and what follows",
        "",
        "Made by `make faults`: a supervised run over hosts in network namespaces of one machine "
        f"({body['hardware']}), {body['steps']} steps, a checkpoint every {body['checkpoint_interval_steps']} steps, "
        f"`--hang-timeout-s {body['hang_timeout_s']:g}`, `--host-timeout-s {body['host_timeout_s']:g}`.",
        "",
        "`noticed_s` counts from the fault, `next_step_s` from noticing, `stopped_s` from the fault to the end of the "
        "supervisor. A run that stopped was started again by the same command after its cause had been mended; "
        "`losses_equal` compares all its losses with those of an undisturbed run, bit by bit (within 1e-5 with fewer "
        "replicas).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for entry in body["entries"]:
        cells = ["" if entry[column] is None else str(entry[column]) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    if body["soak"]:
        shown = {key: value for key, value in body["soak"].items() if key not in ("each", "hung_how")}
        lines += ["", "## Soak", "", *(f"- {key}: {json.dumps(value)}" for key, value in shown.items())]
    return "\n".join(lines) + "\n"


def reference(base: Path, corpus: Path, grid: str, ranks: int, steps: int) -> dict[int, float]:
    """Losses of an undisturbed run on this machine."""
    folder = base / f"reference-{grid}-{steps}"
    folder.mkdir()
    run = launch(folder, supervised_config(corpus, grid, steps), ranks=ranks)
    assert run.wait(400) == 0, run.text()
    return losses(folder, "run")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.fault_report", description=__doc__)
    names = [fault.name for fault in FAULTS] + ["soak"]
    parser.add_argument("--faults", nargs="*", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--launchers", nargs="*", choices=LAUNCHERS, default=LAUNCHERS, help="default: all")
    parser.add_argument("--soak-faults", type=int, default=30, metavar="N", help="faults of the soak (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the soak's draw")
    parser.add_argument("--fresh", action="store_true", help="measure also what the report has already")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/faults.json"), metavar="FILE")
    return parser.parse_args()


def main() -> int:
    """Exit code: 0 when every entry of the report is as expected."""
    arguments = parse_arguments()
    if problem := obstacle():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    sweep()
    report = Report(arguments.output, arguments.fresh)
    with tempfile.TemporaryDirectory(prefix="stagdist-faults-") as name:
        base = Path(name)
        library = Path(sysconfig.get_paths()["stdlib"])
        corpus = base / "stdlib"
        prepare([str(path) for path in sorted(library.glob("*.py"))[:40]], str(corpus), byte_tokenizer())
        references = {
            grid: reference(base, corpus, grid, ranks, STEPS) for grid, ranks in (("pipe2", 2), ("pipe2_data2", 4))
        }
        for fault in (fault for fault in FAULTS if fault.name in arguments.faults):
            for launcher in arguments.launchers:
                if report.has(fault.name, launcher):
                    continue
                started = time.monotonic()
                with Lab(2, shared=[base]) as lab:
                    entry = Drill(lab, fault, launcher, base, corpus, references).measure()
                print(f"{'ok  ' if entry['ok'] else 'FAIL'} {time.monotonic() - started:4.0f} s {entry}", flush=True)
                report.put(entry)
        if "soak" in arguments.faults and (report.body["soak"] is None or arguments.fresh):
            undisturbed = reference(base, corpus, "pipe2", 2, SOAK_STEPS)
            with Lab(2, shared=[base]) as lab:
                report.body["soak"] = soak(lab, base, corpus, undisturbed, arguments.soak_faults, arguments.seed)
            report.save()
    entries = report.body["entries"]
    print(f"{sum(entry['ok'] for entry in entries)} of {len(entries)} entries are as expected: {arguments.output}")
    found = report.body["soak"]
    sound = found is None or (
        found["losses_equal"] and not (found["hung"] or found["orphans"] or found["checkpoints_lost"])
    )
    return 0 if all(entry["ok"] for entry in entries) and sound else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        sys.exit(f"error: {error}")
