#!/usr/bin/env python3
"""Examine hosts and links before a long run: `python launch/doctor.py --hostfile hostfile`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stagdist.parallel.ranks_parser import OneLineParser

MAX_NUMBER = 1_000_000
"""Largest number of an option."""

EPILOG = """\
Asks every host over ssh, then starts ranks there and measures the links between them. Prints one table; ! marks what
differs or is slow; then every finding with its remedy and the verdict.
Exit code: 0 fine, 1 problems found, 2 user error (command line, hostfile, configuration), 130 Ctrl-C.

examples:
  python launch/doctor.py                                      this machine alone, two ranks
  python launch/doctor.py --hostfile hostfile --checkpoints /shared/runs
  python launch/doctor.py --hostfile hostfile --config configs/pythia-160m-staggered.yaml --json doctor.json
  python launch/doctor.py --hostfile hostfile --write-env      writes .deepspeed_env, for starts by `deepspeed`
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(
        prog="doctor.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hostfile", type=Path, metavar="FILE", help="hosts; without it this machine alone")
    add("--num-ranks", type=int, metavar="N", help="ranks on this machine alone (default 2)")
    add("--config", type=Path, metavar="FILE", help="take grid and folder from it; without it each host is a stage")
    key = "override one key of --config; repeatable"
    add("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=key)
    add("--checkpoints", type=Path, metavar="DIR", help="folder to try (default: the configuration's, or runs)")
    add("--write-mib", type=int, default=64, metavar="N", help="size of the file each host writes there (default 64)")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    env = "write the variables that ranks need (default ./.deepspeed_env), secrets into a private file beside it"
    add("--write-env", type=Path, nargs="?", const=Path(".deepspeed_env"), metavar="FILE", help=env)
    limit = "seconds for measuring the links (default 150)"
    add("--time-limit", dest="time_limit_s", type=int, default=150, metavar="S", help=limit)
    parsed = parser.parse_args(arguments)
    if parsed.num_ranks is not None and parsed.hostfile is not None:
        parser.error("--num-ranks belongs to this machine alone; with --hostfile the slots count")
    if parsed.overrides and parsed.config is None:
        parser.error("--set changes the configuration of --config FILE; give that too")
    for name in ("num_ranks", "write_mib", "time_limit_s"):
        value = getattr(parsed, name)
        if value is not None and not 1 <= value <= MAX_NUMBER:
            option = name.removesuffix("_s").replace("_", "-")
            parser.error(f"--{option} must be at least 1 and at most {MAX_NUMBER}, got {value}")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Exit code, see the end of --help."""
    parsed = parse_arguments(arguments)
    from stagdist.cluster.doctor.examination import DoctorOptions, examine
    from stagdist.errors import StagdistError

    parsed.num_ranks = parsed.num_ranks or 2
    try:
        return examine(DoctorOptions(**vars(parsed)))
    except StagdistError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
