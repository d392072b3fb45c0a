#!/usr/bin/env python3
"""Keep a run going over many hosts: `launch/run.py --hostfile hostfile -- launch/pretrain.py --config x.yaml`."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stagdist.errors import ConfigError, StagdistError

if TYPE_CHECKING:
    from stagdist.cluster.placement import Placement
    from stagdist.cluster.supervisor import Options
    from stagdist.config import RunConfig

SHORTEST_HOST_TIMEOUT_S = 3.0

EPILOG = """\
examples:
  python launch/run.py --num-ranks 2 -- launch/pretrain.py --config configs/quickstart.yaml
  python launch/run.py --hostfile hostfile --max-restarts 5 -- launch/pretrain.py --config configs/x.yaml
  python launch/run.py --hostfile h --launcher openmpi --min-data-parallel 2 -- launch/pretrain.py --config x.yaml
  python launch/run.py --hostfile hostfile --folder runs/answers -- launch/generate.py --model runs/x/model --prompt "A"

A rank that dies, or gives no sign of life for --hang-timeout-s, ends the attempt on all hosts; the next one resumes
from the newest complete checkpoint. A host that does not answer is replaced by a spare of the hostfile (`#spare name
slots=N`), or left out where --min-data-parallel allows it, or waited for. SIGTERM makes the ranks save and end. What
happened stands in run.json of the run's folder, the output of every rank in logs/attempt_NNN/.

Exit code: 0 the run has ended in order, 1 it was given up (the last line names the first error), 2 something to mend
first, 128 + signal after a signal.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: our options, `--`, then a script with its own."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        usage="run.py [options] -- SCRIPT [arguments of the script]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--hostfile",
        metavar="FILE",
        help="hosts (`name slots=N`) and spares (`#spare name slots=N`); without: this machine",
    )
    add("--num-ranks", type=int, metavar="N", help="ranks on this machine, without a hostfile (default 2)")
    add("--launcher", choices=("pdsh", "openmpi", "torchrun"), help="how ranks are started on hosts (default pdsh)")
    add("--max-restarts", type=int, default=3, metavar="N", help="in a row without a new checkpoint (default 3)")
    add("--min-data-parallel", type=int, metavar="N", help="go on with fewer replicas, N at least, when a host is gone")
    add("--hang-timeout-s", type=float, default=300.0, metavar="S", help="silence of a working rank (default 300)")
    add(
        "--slow-timeout-s",
        type=float,
        default=1800.0,
        metavar="S",
        help="the same while starting, saving (default 1800)",
    )
    add("--host-timeout-s", type=float, default=10.0, metavar="S", help="silence of a whole host (default 10)")
    add(
        "--host-wait-s",
        type=float,
        default=300.0,
        metavar="S",
        help="wait for a host that cannot be replaced (default 300)",
    )
    add("--stop-s", type=float, default=120.0, metavar="S", help="time for saving after SIGTERM (default 120)")
    add("--address", metavar="IP", help="of this machine, as the hosts reach it (default: found by itself)")
    add("--folder", type=Path, metavar="DIR", help="for logs and run.json (default: that of the run)")
    add(
        "command",
        nargs=argparse.REMAINDER,
        metavar="-- SCRIPT ...",
        help="script and arguments, the same on every rank",
    )
    parsed = parser.parse_args(arguments)
    parsed.command = parsed.command[parsed.command[:1] == ["--"] :]
    if not parsed.command:
        parser.error("nothing to run: write -- and a script, for example -- launch/pretrain.py --config configs/x.yaml")
    if parsed.hostfile is None and parsed.launcher is not None:
        parser.error("--launcher belongs to --hostfile; on this machine alone DeepSpeed's own starts the ranks")
    if parsed.hostfile is not None and parsed.num_ranks is not None:
        parser.error("--num-ranks belongs to this machine alone; a hostfile says slots=N for every host")
    _check_numbers(parser, parsed)
    return parsed


def _check_numbers(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    for name in ("hang_timeout_s", "slow_timeout_s", "host_timeout_s", "stop_s"):
        if not 0 < getattr(parsed, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be seconds above 0")
    for name in ("num_ranks", "min_data_parallel"):
        if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if parsed.host_timeout_s < SHORTEST_HOST_TIMEOUT_S:
        parser.error(f"--host-timeout-s must be at least {SHORTEST_HOST_TIMEOUT_S:g}: hosts report once a second")
    if parsed.max_restarts < 0 or not 0 <= parsed.host_wait_s < float("inf"):
        parser.error("--max-restarts and --host-wait-s must not be negative")


def placement_of(arguments: argparse.Namespace) -> "Placement":
    """Hosts and spares.

    Raises:
        ConfigError: the hostfile cannot be used.
    """
    from stagdist.cluster.hostfile import Host, read_hostfile
    from stagdist.cluster.placement import Placement

    if arguments.hostfile is None:
        return Placement((Host("localhost", arguments.num_ranks or 2),))
    hostfile = read_hostfile(arguments.hostfile)
    return Placement(hostfile.hosts, hostfile.spares)


def config_of(command: list[str]) -> "RunConfig | None":
    """The configuration that a pretraining script would read; None for other scripts.

    A script of the user's own that is called pretrain.py takes the options of ours.

    Raises:
        ConfigError: it is wrong, or an option is.
    """
    if Path(command[0]).name != "pretrain.py":
        return None
    from stagdist.cluster.command_line import pretrain_arguments
    from stagdist.config_loading import load_config

    known = pretrain_arguments(command[1:])
    if known.dry_run:
        raise ConfigError("--dry-run starts no ranks; run it without the supervisor: python launch/pretrain.py ...")
    return load_config(known.config, known.set)


def options_of(arguments: argparse.Namespace) -> "Options":
    """Everything checked that can be checked before a rank runs.

    Raises:
        ConfigError: with the remedy.
    """
    from stagdist.cluster.diagnosis import Limits
    from stagdist.cluster.exports import wanted
    from stagdist.cluster.launchers import check_paths
    from stagdist.cluster.supervisor import Options
    from stagdist.parallel.grid import grid_for

    placement, config = placement_of(arguments), config_of(arguments.command)
    if not Path(arguments.command[0]).is_file():
        raise ConfigError(
            f"{arguments.command[0]} is no script; write for example -- launch/pretrain.py --config x.yaml"
        )
    if config is None and (arguments.folder is None or arguments.min_data_parallel is not None):
        raise ConfigError("scripts other than pretrain.py need --folder, and have no --min-data-parallel")
    if config is not None:
        data = grid_for(config, placement.world_size).data
        fewest = arguments.min_data_parallel or 1
        if fewest > data:
            raise ConfigError(f"--min-data-parallel {fewest} is more than the run has: data {data}")
    folder = Path(arguments.folder or config.folder).resolve()  # type: ignore[union-attr]
    check_paths(folder, Path.cwd(), sys.executable)
    environment = {name: value for name, value in wanted(os.environ).items() if not name.startswith("MASTER_")}
    return Options(
        command=tuple(arguments.command),
        launcher="local" if arguments.hostfile is None else arguments.launcher or "pdsh",
        placement=placement,
        folder=folder,
        environment=environment,
        address=arguments.address,
        max_restarts=arguments.max_restarts,
        limits=Limits(arguments.hang_timeout_s, arguments.slow_timeout_s, arguments.host_timeout_s),
        lease_s=1.5 * arguments.host_timeout_s,
        stop_s=arguments.stop_s,
        host_wait_s=arguments.host_wait_s,
        fits=None if config is None else _fits(config, arguments.min_data_parallel),
    )


def _fits(config: "RunConfig", min_data_parallel: int | None) -> Callable[[int], bool] | None:
    if min_data_parallel is None:
        return None
    from stagdist.parallel.grid import grid_for

    def fits(world_size: int) -> bool:
        try:
            return grid_for(config, world_size).data >= min_data_parallel
        except ConfigError:
            return False

    return fits


def main() -> int:
    """Exit code: see --help."""
    arguments = parse_arguments()
    from stagdist.cluster.screen import Screen

    out, err = Screen(sys.stdout.fileno()), Screen(sys.stderr.fileno())
    logging.basicConfig(
        level=logging.INFO, stream=err, format="%(asctime)s supervisor: %(message)s", datefmt="%H:%M:%S"
    )
    from stagdist.cluster.supervisor import Supervisor

    try:
        return asyncio.run(Supervisor(options_of(arguments), lambda line: out.write(f"{line}\n")).run())
    except StagdistError as error:
        err.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        out.close()
        err.close()


if __name__ == "__main__":
    sys.exit(main())
