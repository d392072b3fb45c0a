"""What all benchmark commands share: options, one line for user errors, exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from stagdist.errors import ConfigError, StagdistError
from stagdist.parallel.ranks_parser import RanksParser
from stagdist.parallel.world import join_launcher

AddArguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def add_options(parser: argparse.ArgumentParser, *names: str, **changes: str) -> None:
    """Add options that several benchmarks have; `changes` replaces the help of an option."""
    options: dict[str, dict[str, object]] = {
        "json": {"metavar": "FILE", "help": "write all results to this file"},
        "set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "override one key of --config"},
        "device": {"default": "auto", "metavar": "DEVICE", "help": "auto, cpu, cuda or cuda:N (default: auto)"},
        "threads": {"type": int, "default": 1, "metavar": "N", "help": "threads of each process (default: 1)"},
        "folder": {"metavar": "DIR", "help": "where files go (default: a temporary folder)"},
    }
    for name in names:
        parser.add_argument(f"--{name}", **options[name] | ({"help": changes[name]} if name in changes else {}))  # type: ignore[arg-type]


def share_cores() -> None:
    """On a rank of a launcher: take this process's share of the cores. Call it before torch is imported."""

    def share() -> int:
        join_launcher().share_cores()
        return 0

    if code := _guarded(share):
        sys.exit(code)


def main(description: str | None, add_arguments: AddArguments, run: Run, arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured, 1 a failure or a missed prediction, 2 a user error."""

    def parse_and_run() -> int:
        parser = RanksParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
        add_arguments(parser)
        return run(parser.parse_args(arguments))

    return _guarded(parse_and_run)


def _guarded(action: Callable[[], int]) -> int:
    try:
        return action()
    except StagdistError as error:
        # A user error is the same on every rank, so only the first reports it.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
