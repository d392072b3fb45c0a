#!/usr/bin/env python3
"""Pretrain a StagFormer: `deepspeed launch/pretrain.py --config configs/x.yaml`."""

import argparse
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagdist.errors import StagdistError

STARTED_AT = time.monotonic()
OTHERS_WAIT_S = 3.0
"""Seconds before a rank that is not the first of its host prints an error of its own."""

EPILOG = """\
examples:
  deepspeed --num_accelerators 2 launch/pretrain.py --config configs/quickstart.yaml
  deepspeed --hostfile hostfile launch/pretrain.py --config configs/pythia-160m-staggered.yaml \\
      --set training.micro_batch_size=8 --set parallel.tensor_parallel_size=2
  python launch/pretrain.py --config configs/quickstart.yaml --dry-run --world-size 64

A run goes on by itself from its newest complete checkpoint: type the same command again.
SIGTERM or SIGUSR1 to any rank makes all ranks save and end in order.
Every key is explained in docs/configuration.md.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line; DeepSpeed's launcher adds --local_rank."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration of the run, YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, for example a.b=3; repeatable",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print grid, parameters, memory and every obstacle; start nothing"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for (with --dry-run)")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="resume from a checkpoint although its files can run any program: only if you trust who made it",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.world_size is not None and not arguments.dry_run:
        parser.error("--world-size belongs to --dry-run; a run takes its size from the launcher")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Check everything that needs no process group, then train."""
    from stagdist.cluster.environment import join_launcher
    from stagdist.config_loading import load_config
    from stagdist.parallel.grid import grid_for
    from stagdist.telemetry.logging import setup_logging
    from stagdist.telemetry.pulse import Pulse

    pulse = Pulse.from_environment()
    world = join_launcher()
    world.share_cores()
    setup_logging(world.rank, None)
    config = load_config(arguments.config, arguments.set)
    grid = grid_for(config, world.size)

    from stagdist.parallel.groups import device_type

    device = device_type(config.parallel.device, config.training.precision, world.local_rank)
    # Spares DeepSpeed its own guess, which on a GPU machine would overrule parallel.device: cpu.
    os.environ["DS_ACCELERATOR"] = device

    from stagdist.training.pretrain import check_before_start, pretrain

    check_before_start(config)
    setup_logging(world.rank, config.folder)
    outcome = pretrain(config, grid, device, STARTED_AT, pulse, trust_pickle=arguments.trust_pickle)
    if world.rank == 0:
        done = "finished" if outcome.finished else "stopped, the same command goes on from here"
        print(f"{config.folder}: {done} at step {outcome.state.step} of {config.training.steps}", file=sys.stderr)
    return 0


def main() -> int:
    """Exit code: 0 done or stopped in order, 1 a failure while running, 2 something to mend first."""
    arguments = parse_arguments()
    from stagdist.errors import ConfigError, DataError, StagdistError

    if arguments.dry_run:
        from stagdist.parallel.dry_run import dry_run

        text, code = dry_run(arguments.config, arguments.set, arguments.world_size)
        print(text, end="")
        return code
    try:
        return run(arguments)
    except StagdistError as error:
        if _speaks(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError | DataError) else 1
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


def _speaks(error: "StagdistError") -> bool:
    """Whether this rank prints an error that other ranks may meet as well.

    The first rank of a host speaks at once. The others wait: normally the launcher ends them before their turn, and
    what they alone have met is still told.
    """
    from stagdist.errors import TransportError

    if error.everywhere:
        return os.environ.get("RANK", "0") == "0"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(OTHERS_WAIT_S)
    return not isinstance(error, TransportError)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Peers may wait for this rank in a collective; leaving at once is what tells them.
        os._exit(code)
    sys.exit(code)
