"""Everything that only a GPU can show, in one command: `python -m tests.gpu.check --output FILE`, or `make gpu-check`.

Every check runs in a process of its own with a time limit, so that one that hangs costs its limit and no more. The file
is rewritten after each of them. `--rehearse` runs the same code on the CPU with tiny shapes.
"""

import argparse
import ctypes
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.conditions import conditions
from tests.gpu.checks.setting import Numbers, Setting
from tests.ranks import ROOT, run_ranks

PERFORM = "tests.gpu.checks.setting:perform"
SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}
"""What lets two ranks share a GPU, from NCCL 2.30 on: experimental, with few blocks each and without NVLink SHARP."""
UNBUFFERED = {"NCCL_BUFFSIZE": "32768", "NCCL_MAX_P2P_NCHANNELS": "1", "NCCL_P2P_LL_THRESHOLD": "0"}
"""What lets NCCL hold 32 KiB of a message, not 4 MiB per channel: a larger one is sent only as it is received, as those
of real models are. The last keeps small messages out of the buffers of another protocol."""
NAME_S = 60.0
"""Limit of the process that asks for the name of the GPU."""
REASON_CHARACTERS = 160
REHEARSAL_PATIENCE = 3
"""A rehearsal has so many times the limits: it may share the cores with other tests."""
SHORTEST_S = 5.0
"""A check is not begun when less than this is left."""


@dataclass(frozen=True)
class Check:
    """One check and what it may cost.

    Attributes:
        target: `module:function` below `tests.gpu.checks`.
        limit_s: seconds after which its processes are killed on a GPU; see `REHEARSAL_PATIENCE`.
        arguments: given to the function.
        ranks: processes that call it together.
        interpreted: a rehearsal runs its Triton kernels, in Triton's interpreter.
    """

    name: str
    target: str
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    interpreted: bool = False


def _decode(name: str, **arguments: Any) -> Check:
    return Check(f"two_ranks_{name}", "tests.gpu.checks.two_ranks:decode", 60, arguments, ranks=2)


CHECKS = (
    Check("environment", "tests.gpu.checks.environment:environment", 60),
    Check("decode_parity", "tests.gpu.checks.decode_parity:decode_parity", 240),
    Check("decode_speed", "tests.gpu.checks.decode_speed:decode_speed", 120),
    Check("host", "tests.gpu.checks.host:host", 40),
    Check("kernels", "tests.gpu.checks.kernels:kernels", 60),
    _decode("last", head="last"),
    _decode("sharded", head="sharded"),
    _decode("combined", head="last", combined=True),
    Check("two_ranks_killed", "tests.gpu.checks.killed:killed", 60, ranks=2),
    Check("products", "tests.gpu.checks.products:products", 90, interpreted=True),
    Check("generate", "tests.gpu.checks.generate:generate", 60),
    Check("serve", "tests.gpu.checks.serve:serve", 60),
    _decode("eager", head="last", graphs=False),
    _decode("traced", head="last", graphs=False, traced=True),
    Check("two_ranks_training", "tests.gpu.checks.two_ranks:training", 60, ranks=2),
    Check("training_parity", "tests.gpu.checks.training:training_parity", 60),
    Check("training_resume", "tests.gpu.checks.training:training_resume", 50),
    Check("eager", "tests.gpu.checks.decode_speed:eager", 50),
    Check("sanitizer", "tests.gpu.checks.decode_parity:sanitizer", 40),
    Check("training_speed", "tests.gpu.checks.training:training_speed", 75),
    Check("attention", "tests.gpu.checks.attention:attention", 40),
    Check("loading", "tests.gpu.checks.loading:loading", 40),
    Check("queues", "tests.gpu.checks.loading:queues", 40),
)
"""In the order in which they run: by value, should the time not suffice."""


@dataclass(frozen=True)
class Record:
    """What came of a check.

    Attributes:
        ok: None where it was skipped or cannot run here; `error` says why.
        numbers: of a check that failed, those that it had kept.
    """

    name: str
    ok: bool | None
    seconds: float
    numbers: Numbers = field(default_factory=dict)
    error: str | None = None


def perform_check(check: Check, setting: Setting, limit_s: float, variables: dict[str, str]) -> Record:
    """Run a check in processes of its own, which are killed with all that they started when the limit has passed.

    Args:
        variables: environment of these processes besides this process's; without any they are forks of a process that
            has imported the frameworks on the CPU.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stagdist-check-") as folder:
        kept = Path(folder) / "kept.json"
        payload = (check.target, check.arguments, replace(setting, kept=kept))
        ok: bool | None = False
        numbers, error = {}, None
        try:
            outcome = run_ranks(PERFORM, check.ranks, payload, limit_s, variables)[0]
            error = outcome.get("impossible")
            ok, numbers = (None if error else True), outcome.get("numbers", {})
        except Exception as failure:  # whatever happened, the other checks go on
            error = f"{type(failure).__name__}: {failure}"
            for folder_of_code in (str(ROOT), sys.prefix, sys.base_prefix):  # results name no path of the machine
                error = error.replace(f"{folder_of_code}{os.sep}", "")
        if not ok and kept.exists():
            numbers = json.loads(kept.read_text())
    return Record(check.name, ok, time.monotonic() - began, numbers, error)


def run_checks(checks: Sequence[Check], setting: Setting, budget_s: float, nccl: str | None) -> Iterator[Record]:
    """The record of each check, as soon as it exists.

    Args:
        budget_s: seconds for all of them together; a check that has not ended by then is recorded as skipped.
        nccl: library that is preloaded where several ranks meet.
    """
    end = time.monotonic() + budget_s
    for check in checks:
        left = end - time.monotonic()
        if left < SHORTEST_S:
            yield Record(check.name, None, 0.0, error=f"skipped: the budget of {budget_s:g} s is used up")
            continue
        limit_s = check.limit_s * (1 if setting.on_gpu else REHEARSAL_PATIENCE)
        with _preloaded(nccl if check.ranks > 1 else None):
            record = perform_check(check, setting, min(limit_s, left), _variables(check, setting))
        if record.ok is False and left < limit_s and record.seconds >= left:
            error = f"the budget of {budget_s:g} s ended while it ran: {record.error}"
            record = replace(record, ok=None, error=error)
        yield record


def _variables(check: Check, setting: Setting) -> dict[str, str]:
    if not setting.on_gpu:
        return {"TRITON_INTERPRET": "1"} if check.interpreted else {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(setting.gpus))))
    ranks = {"NCCL_DEBUG": "WARN", **UNBUFFERED} if check.ranks > 1 else {}
    shared = SHARED_GPU if check.ranks > setting.gpus else {}
    return {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": visible, **ranks, **shared}


@contextmanager
def _preloaded(library: str | None) -> Iterator[None]:
    """Processes started inside load this library before those that they ask for; the linker reads it at their start."""
    before = os.environ.get("LD_PRELOAD")
    if library is not None:
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [library, before]))
    try:
        yield
    finally:
        if library is not None:
            os.environ.pop("LD_PRELOAD")
            if before is not None:
                os.environ["LD_PRELOAD"] = before


def write(path: Path, header: dict[str, Any], records: Sequence[Record]) -> None:
    """Store all records so far, aside and then renamed, so that the file is whole at any moment."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(header | {"records": [asdict(record) for record in records]}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def table(records: Sequence[Record]) -> str:
    """One line for each check, with the reason where it did not pass, and one for each goal."""
    lines = [f"{'check':<20} {'result':<8} {'s':>6}  reason"]
    for record in records:
        result = {True: "passed", False: "FAILED", None: "skipped"}[record.ok]
        lines.append(f"{record.name:<20} {result:<8} {record.seconds:>6.1f}  {_reason(record)}".rstrip())
    for record in records:
        for name, goal in record.numbers.get("goals", {}).items():
            verdict = {True: "met", False: "MISSED", None: "not judged"}[goal["met"]]
            lines.append(f"{verdict}: {name}: {goal['measured']:.3g}, goal {goal['goal']:g}")
    passed, failed = (sum(record.ok is wanted for record in records) for wanted in (True, False))
    lines.append(f"{passed} passed, {failed} failed, {len(records) - passed - failed} skipped")
    return "\n".join(lines)


def _reason(record: Record) -> str:
    """First line of the error; where it is a traceback, the line that names the exception."""
    first, *rest = (record.error or "").partition("\noutput of rank")[0].splitlines() or [""]
    if not first.endswith("failed:"):
        return first[:REASON_CHARACTERS]
    named = [line for line in rest if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (named or rest)[-1][:REASON_CHARACTERS]


def parse_arguments(arguments: Sequence[str] | None, checks: Sequence[Check] = CHECKS) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="results, as JSON")
    names = ", ".join(check.name for check in checks)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"run only checks whose names start with NAME; available: {names}"
    )
    parser.add_argument("--budget-s", type=float, default=500.0, metavar="S", help="seconds for all (default 500)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--nccl", metavar="LIBRARY", help="NCCL library to preload where two ranks meet")
    parsed = parser.parse_args(arguments)
    for name in parsed.only or []:
        if not any(check.name.startswith(name) for check in checks):
            parser.error(f"--only {name}: no check starts with {name!r}; available: {names}")
    if not 0 < parsed.budget_s < math.inf:  # NaN compares false
        parser.error(f"--budget-s {parsed.budget_s}: give seconds above 0")
    if parsed.nccl is not None:
        try:
            ctypes.CDLL(str(Path(parsed.nccl).resolve()))
        except OSError as error:
            parser.error(f"--nccl {parsed.nccl} cannot be loaded: {error}; give the path of libnccl.so.2")
    if parsed.output.is_dir():
        parser.error(f"--output {parsed.output} is a folder; give the name of a file")
    try:
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parsed.output.parent).close()
    except OSError as error:
        parser.error(f"--output {parsed.output} cannot be written: {error.strerror or error}")
    return parsed


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Exit code: 0 nothing failed, 1 something did, 2 there is no GPU."""
    options = parse_arguments(arguments, checks)
    setting, device_name = Setting(), None
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("gpu-check: torch sees no CUDA device; --rehearse runs the checks on the CPU", file=sys.stderr)
            return 2
        setting = Setting(gpus=torch.cuda.device_count())
        # A CUDA context made here would stay beside all checks.
        asking = Check("name", "torch.cuda:get_device_name", NAME_S)
        (device_name,) = run_ranks(asking.target, 1, None, asking.limit_s, _variables(asking, setting))
    configuration = {
        "rehearsal": options.rehearse,
        "only": options.only,
        "budget_s": options.budget_s,
        "nccl": None if options.nccl is None else Path(options.nccl).name,
    }
    header = conditions(device_name, setting.gpus) | {"configuration": configuration}
    chosen = [check for check in checks if not options.only or check.name.startswith(tuple(options.only))]
    nccl = None if options.nccl is None else str(Path(options.nccl).resolve())
    records: list[Record] = []
    for record in run_checks(chosen, setting, options.budget_s, nccl):
        records.append(record)
        write(options.output, header, records)
        print(f"{record.name}: {record.seconds:.1f} s", file=sys.stderr, flush=True)
    print(table(records))
    return int(any(record.ok is False for record in records))


if __name__ == "__main__":
    sys.exit(main())
