"""Command lines that every rank parses, and the supervisor before them. One rank reports an error for all."""

import argparse
import os
import time
from collections.abc import Sequence
from typing import NoReturn

from stagdist.errors import ConfigError, StagdistError, TransportError

OTHERS_WAIT_S = 10.0
"""Seconds that ranks other than the first of a host wait before they print an error that all ranks may have met."""


class OneLineParser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Report an invalid command line and exit with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


class RanksParser(argparse.ArgumentParser):
    """Raises where argparse would print the usage and exit, because all ranks have the same command line."""

    def error(self, message: str) -> NoReturn:
        """Report an invalid command line.

        Raises:
            ConfigError: always, the same on every rank.
        """
        problem = ConfigError(f"{message} (see --help)")
        problem.everywhere = True
        raise problem


PRETRAIN_EPILOG = """\
examples:
  deepspeed --num_accelerators 2 launch/pretrain.py --config configs/quickstart.yaml
  deepspeed --hostfile hostfile launch/pretrain.py --config configs/pythia-160m-staggered.yaml \\
      --set training.micro_batch_size=8 --set parallel.tensor_parallel_size=2
  python launch/pretrain.py --config configs/quickstart.yaml --dry-run --world-size 64

To resume a run from its newest complete checkpoint, type the same command again.
After SIGTERM or SIGUSR1 to any rank, all ranks save and shut down cleanly.
All keys are documented in docs/configuration.md.
"""


def pretrain_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of launch/pretrain.py; DeepSpeed's launcher adds --local_rank.

    Raises:
        ConfigError: it is invalid.
    """
    parser = RanksParser(
        prog="pretrain.py",
        description="Pretrain a StagFormer: `deepspeed launch/pretrain.py --config configs/x.yaml`.",
        epilog=PRETRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="configuration of the run, YAML")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, for example a.b=3; repeatable",
    )
    add("--dry-run", action="store_true", help="print grid, parameters, memory and every problem; start nothing")
    add("--world-size", type=int, metavar="N", help="ranks to plan for (with --dry-run)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.world_size is not None and not parsed.dry_run:
        parser.error("--world-size needs --dry-run; a run gets its size from the launcher")
    return parsed


def reports_error(error: StagdistError, *, rank_1_reports_lost_peer: bool = False) -> bool:
    """Whether this rank prints an error that other ranks may raise as well.

    The first rank of a host prints at once. The others wait, and normally the launcher ends them before they print. An
    error that only they have raised is printed then.

    Args:
        rank_1_reports_lost_peer: rank 1 prints a TransportError at once, because the lost peer may be rank 0.
    """
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if error.everywhere or rank == "0":
        return rank == "0"
    if local_rank == "0":
        return True
    lost_peer = isinstance(error, TransportError)
    if lost_peer and rank_1_reports_lost_peer:
        return rank == "1"
    time.sleep(OTHERS_WAIT_S)
    return not lost_peer
