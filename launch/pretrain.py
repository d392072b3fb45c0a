#!/usr/bin/env python3
"""Pretrain a StagFormer: `deepspeed launch/pretrain.py --config configs/x.yaml`."""

import argparse
import os
import sys
import time
import traceback

STARTED_AT = time.monotonic()


def run(arguments: argparse.Namespace) -> int:
    """Check configuration and data, then train."""
    from stagdist.config.loading import load_config
    from stagdist.parallel.grid import grid_for
    from stagdist.parallel.world import join_launcher
    from stagdist.telemetry.logging import setup_logging
    from stagdist.telemetry.pulse import Pulse

    pulse = Pulse.from_environment()
    world = join_launcher()
    world.share_cores()
    setup_logging(world.rank, None)
    config = load_config(arguments.config, arguments.set)
    grid = grid_for(config, world.size)

    from stagdist.parallel.world import choose_device

    device = choose_device(config.parallel.device, world.local_rank, option="parallel.device")
    # Otherwise DeepSpeed would choose, and on a GPU machine override parallel.device: cpu.
    os.environ["DS_ACCELERATOR"] = device.partition(":")[0]

    from stagdist.training.pretrain import check_before_start, pretrain

    check_before_start(config, device)
    setup_logging(world.rank, config.folder)
    outcome = pretrain(config, grid, device, STARTED_AT, pulse)
    if world.rank == 0:
        done = "finished" if outcome.finished else "stopped, the same command resumes from here"
        print(f"{config.folder}: {done} at step {outcome.state.step} of {config.training.steps}", file=sys.stderr)
    return 0


def main() -> int:
    """Exit code: 0 done or stopped as requested, 1 an error while running, 2 invalid configuration or input."""
    from stagdist.errors import CheckpointError, ConfigError, DataError, SavingError, StagdistError
    from stagdist.parallel.ranks_parser import pretrain_arguments, reports_error

    try:
        arguments = pretrain_arguments()
        if arguments.dry_run:
            from stagdist.data.compatibility import problems_on_this_machine
            from stagdist.planning.dry_run import dry_run

            text, code = dry_run(
                arguments.config, arguments.set, arguments.world_size, data_problems=problems_on_this_machine
            )
            print(text, end="")
            return code
        return run(arguments)
    except StagdistError as error:
        if reports_error(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        invalid = isinstance(error, CheckpointError | ConfigError | DataError) and not isinstance(error, SavingError)
        return 2 if invalid else 1
    except SystemExit as end:  # --help
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Other ranks may wait for this one in a collective. They notice when the process ends, so it must end at once.
        os._exit(code)
    sys.exit(code)
