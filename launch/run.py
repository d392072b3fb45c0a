#!/usr/bin/env python3
"""Supervise a run over many hosts: `launch/run.py --hostfile hostfile -- launch/pretrain.py --config x.yaml`."""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from stagdist.errors import ConfigError, StagdistError
from stagdist.parallel.ranks_parser import OneLineParser

SHORTEST_HOST_TIMEOUT_S = 3.0

EPILOG = """\
examples:
  python launch/run.py --num-ranks 2 -- launch/pretrain.py --config configs/quickstart.yaml
  python launch/run.py --hostfile hostfile --max-restarts 5 -- launch/pretrain.py --config configs/x.yaml
  python launch/run.py --hostfile h --start-with srun --min-data-parallel 2 -- launch/pretrain.py --config x.yaml
  python launch/run.py --hostfile hostfile --folder runs/answers -- launch/generate.py --model runs/x/model --prompt "A"
  python launch/run.py --hostfile hostfile --folder runs/server -- launch/serve.py --model runs/x/model --host 0.0.0.0

Hosts are reached over ssh without a password, this machine directly. Inside a Slurm allocation where ssh does not work,
or with --start-with srun, agents are started by srun, and the hostfile holds nodes of the allocation.

A rank that dies, or gives no sign of life for --hang-timeout-s, ends the attempt on all hosts; the next one resumes
from the newest complete checkpoint. A host that does not answer is replaced by a spare of the hostfile (`#spare name
slots=N`), or left out where --min-data-parallel allows it, or waited for. SIGTERM makes the ranks save and end. What
happened is recorded in run.json of the run's folder, and the output of every rank in logs/attempt_NNN/.

A server (launch/serve.py) is started again whenever it came as far as serving. Its HTTP process stays meanwhile and
writes to logs/http.HOST.log. SIGTERM makes it finish its requests.

Exit code: 0 the run has ended cleanly, 1 it was given up (the last line names the first error), 2 user error,
128 + signal after a signal.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: our options, `--`, then a script with its own."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    parsed.command = parsed.command[parsed.command[:1] == ["--"] :]
    if not parsed.command:
        parser.error("nothing to run: write -- and a script, for example -- launch/pretrain.py --config configs/x.yaml")
    if parsed.hostfile is None and parsed.start_with is not None:
        parser.error("--start-with belongs to --hostfile; on this machine ranks are started directly")
    if parsed.hostfile is not None and parsed.num_ranks is not None:
        parser.error("--num-ranks belongs to this machine alone; a hostfile says slots=N for every host")
    _check_numbers(parser, parsed)
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="run.py",
        usage="run.py [options] -- SCRIPT [arguments of the script]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    hosts = "hosts (`name slots=N`) and spares (`#spare name slots=N`); without: this machine"
    add("--hostfile", metavar="FILE", help=hosts)
    add("--num-ranks", type=int, metavar="N", help="ranks on this machine, without a hostfile (default 2)")
    how = "what starts ranks on other hosts (default ssh; srun in a Slurm allocation where ssh does not work)"
    add("--start-with", choices=("ssh", "srun"), help=how)
    add("--max-restarts", type=int, default=3, metavar="N", help="in a row without a new checkpoint (default 3)")
    add("--min-data-parallel", type=int, metavar="N", help="continue with at least N replicas when a host is gone")
    add("--hang-timeout-s", type=float, default=300.0, metavar="S", help="limit between heartbeats (default 300)")
    slow = "the same while starting, saving (default 1800)"
    add("--slow-timeout-s", type=float, default=1800.0, metavar="S", help=slow)
    add("--host-timeout-s", type=float, default=10.0, metavar="S", help="time without a message of a host (default 10)")
    wait = "wait for a host that cannot be replaced (default 300)"
    add("--host-wait-s", type=float, default=300.0, metavar="S", help=wait)
    add("--stop-s", type=float, default=120.0, metavar="S", help="time for saving after SIGTERM (default 120)")
    add("--folder", type=Path, metavar="DIR", help="for logs and run.json (default: that of the run)")
    same = "script and arguments, the same on every rank"
    add("command", nargs=argparse.REMAINDER, metavar="-- SCRIPT ...", help=same)
    return parser


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


def main() -> int:
    """Exit code: see --help."""
    arguments = parse_arguments()
    from stagdist.cluster.supervision.background_output import BackgroundWriter

    out, err = BackgroundWriter(sys.stdout.fileno()), BackgroundWriter(sys.stderr.fileno())
    logging.basicConfig(
        level=logging.INFO, stream=err, format="%(asctime)s supervisor: %(message)s", datefmt="%H:%M:%S"
    )
    from stagdist.cluster.supervision.options import options_of
    from stagdist.cluster.supervision.supervisor import Supervisor

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
