"""Turns the command line of launch/run.py into the options of the supervisor, and checks them before a rank starts."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stagdist.cluster.hosts.hostfile import Host, read_hostfile
from stagdist.cluster.hosts.reach import StartWay, early_variables
from stagdist.cluster.hosts.shell_variables import rank_variables
from stagdist.cluster.supervision.diagnosis import SilenceLimits
from stagdist.cluster.supervision.placement import HostPlacement
from stagdist.config.loading import load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.files import locked
from stagdist.parallel.grid import grid_for
from stagdist.parallel.ranks_parser import pretrain_arguments

SERVER = "serve.py"
SCRIPTS_WITH_HEARTBEAT = ("pretrain.py", "generate.py", SERVER)
"""Scripts whose ranks send heartbeats: a rank without heartbeats is stuck."""


@dataclass(frozen=True)
class SupervisorOptions:
    """How a run is supervised."""

    command: tuple[str, ...]  # script and its arguments
    start_with: StartWay | None  # starts the agents of other machines; None: ssh, or srun where ssh does not work
    placement: HostPlacement  # hosts and spares
    folder: Path  # of the run: logs and run.json go there; all hosts see it
    environment: Mapping[str, str]  # variables for the ranks
    max_restarts: int  # in a row without a new checkpoint, after which the supervisor gives up
    limits: SilenceLimits  # how long ranks and hosts may go without a heartbeat
    lease_s: float  # a rank ends after this time without a message from the supervisor
    stop_s: float  # time for a clean shutdown
    host_wait_s: float  # how long a host that died, and cannot be replaced, is waited for
    # whether the run exists on so many ranks, for continuing with fewer; None: not allowed
    fits: Callable[[int], bool] | None
    serves: bool = False  # no run with an end: an attempt that came to serve is progress, like a checkpoint


def placement_of(arguments: argparse.Namespace) -> HostPlacement:
    """Hosts and spares.

    Raises:
        ConfigError: the hostfile cannot be used.
    """
    if arguments.hostfile is None:
        return HostPlacement((Host("localhost", arguments.num_ranks or 2),))
    hostfile = read_hostfile(arguments.hostfile)
    return HostPlacement(hostfile.hosts, hostfile.spares)


def config_of(command: list[str]) -> RunConfig | None:
    """The configuration that a pretraining script would read; None for other scripts.

    A script of the user's own that is called pretrain.py takes the options of ours.

    Raises:
        ConfigError: it is wrong, or an option is.
    """
    if Path(command[0]).name != "pretrain.py":
        return None
    known = pretrain_arguments(command[1:])
    if known.dry_run:
        raise ConfigError("--dry-run starts no ranks; run it without the supervisor: python launch/pretrain.py ...")
    return load_config(known.config, known.set)


def options_of(arguments: argparse.Namespace) -> SupervisorOptions:
    """Everything checked that can be checked before a rank runs.

    Raises:
        ConfigError: with the remedy.
    """
    placement, config = placement_of(arguments), config_of(arguments.command)
    if not os.path.isfile(arguments.command[0]):
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
    early_variables(os.environ)
    environment = {name: value for name, value in rank_variables(os.environ).items() if not name.startswith("MASTER_")}
    return SupervisorOptions(
        command=tuple(arguments.command),
        start_with=arguments.start_with,
        placement=placement,
        folder=folder,
        environment=environment,
        max_restarts=arguments.max_restarts,
        limits=_limits_of(arguments),
        lease_s=1.5 * arguments.host_timeout_s,
        stop_s=arguments.stop_s,
        host_wait_s=arguments.host_wait_s,
        fits=None if config is None else _fits(config, arguments.min_data_parallel),
        serves=Path(arguments.command[0]).name == SERVER,
    )


def _limits_of(arguments: argparse.Namespace) -> SilenceLimits:
    heartbeat = Path(arguments.command[0]).name in SCRIPTS_WITH_HEARTBEAT
    start_s = arguments.slow_timeout_s if heartbeat else float("inf")
    return SilenceLimits(arguments.hang_timeout_s, arguments.slow_timeout_s, arguments.host_timeout_s, start_s)


def _fits(config: RunConfig, min_data_parallel: int | None) -> Callable[[int], bool] | None:
    if min_data_parallel is None:
        return None

    def fits(world_size: int) -> bool:
        try:
            return grid_for(config, world_size).data >= min_data_parallel
        except ConfigError:
            return False

    return fits


@contextlib.contextmanager
def only_supervisor(path: Path) -> Iterator[None]:
    """Hold the lock of a run.

    Raises:
        ConfigError: another supervisor holds it, the folder cannot be written, or its file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path))
        except TimeoutError:
            raise ConfigError(f"{path}: another supervisor is at work on this run; stop it first") from None
        except OSError as error:
            raise ConfigError(
                f"folder {path.parent} cannot be written or locked: {error.strerror or error}; choose another "
                "runs_directory or --folder"
            ) from error
        yield
