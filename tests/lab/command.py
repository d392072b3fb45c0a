"""`python -m tests.lab.command up|list|down`: labs that are brought up, listed and taken down by hand."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab.hosts import DISK_BYTES, Lab
from tests.lab.wiring import LABS, MAX_HOSTS, SUBNET, Record, records, sweep, take_down


def up(num_hosts: int, slots: int, num_spares: int, shared: Sequence[Path]) -> str:
    """Leave a lab up; what to tell whoever asked for it."""
    _check_shared(shared)
    lab = Lab(num_hosts + num_spares, shared=shared, keep=True)
    hosts, spares = lab.hosts[:num_hosts], lab.hosts[num_hosts:]
    hostfile = lab.folder / "hostfile"
    lines = [*(f"{host} slots={slots}" for host in hosts), *(f"#spare {host} slots={slots}" for host in spares)]
    hostfile.write_text("\n".join(lines) + "\n")
    enter = lab.folder / "enter"
    address = f"{SUBNET}.${{host#node}}"
    enter.write_text(
        "#!/bin/sh\n# enter HOST [COMMAND]\nhost=$1; shift\n"
        f'exec nsenter --net=/run/netns/{lab.name}-n"${{host#node}}" '
        f'ssh -t -F {lab.folder}/home/.ssh/config "{address}" "$@"\n'
    )
    enter.chmod(0o700)
    standing_by = f"; {', '.join(spares)} in reserve" if spares else ""
    return f"""\
Lab {lab.name} is up: {", ".join(hosts)} ({SUBNET}.1 to {SUBNET}.{num_hosts}), slots={slots} each{standing_by}.
  enter a host    {enter} node1        (a login shell in the repository, .venv on PATH;
                  one command there: {enter} node1 "bash -lc 'COMMAND'")
  hostfile        {hostfile}
  small disk      {lab.disk}   ({DISK_BYTES >> 20} MiB)
  a first run     deepspeed --hostfile {hostfile} --master_addr {lab.address("node1")} launch/pretrain.py --config ...
  cut a link      ip -n {lab.name}-sw link set p2 down        (and up)
  take it down    {sys.executable} -m tests.lab.command down {lab.name}
Hosts share the file system except /tmp, /run and /dev/shm. Shared are {", ".join(map(str, [lab.folder, *shared]))}."""


def _check_shared(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise RuntimeError(f"{folder} is no folder that hosts could share")
        if any(folder.resolve().is_relative_to(own) for own in ("/run", "/dev/shm")):
            raise RuntimeError(f"{folder} cannot be shared: every host has its own /run and /dev/shm")


def main() -> int:
    """Bring up, list and take down labs by hand."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.command", description=main.__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("up", help="bring a lab up and leave it up")
    start.add_argument("--hosts", type=int, default=2, metavar="N", help=f"at most {MAX_HOSTS} (default 2)")
    start.add_argument("--slots", type=int, default=1, metavar="N", help="per host, in the hostfile (default 1)")
    start.add_argument("--spares", type=int, default=0, metavar="N", help="more hosts, in reserve (default 0)")
    start.add_argument(
        "--shared", type=Path, nargs="+", default=[], metavar="DIR", help="folders below /tmp that the hosts share"
    )
    verbs.add_parser("list", help=f"the labs of this machine, see {LABS}")
    stop = verbs.add_parser("down", help="end everything in a lab and remove it")
    stop.add_argument("name", metavar="NAME", help="as `list` shows it")
    arguments = parser.parse_args()
    if arguments.verb == "up" and (arguments.hosts < 1 or arguments.slots < 1 or arguments.spares < 0):
        parser.error("a lab has at least one host of one slot")
    try:
        if arguments.verb == "up":
            sweep()
            shared = [path.absolute() for path in arguments.shared]
            print(up(arguments.hosts, arguments.slots, arguments.spares, shared))
        elif arguments.verb == "down":
            take_down(Record.load(arguments.name))
        else:
            for record in records():
                owner = f"owned by process {record.owner.pid}" if record.owner else "stays up"
                print(f"{record.name}  {', '.join(record.hosts)}  {owner}")
    except (FileNotFoundError, RuntimeError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
