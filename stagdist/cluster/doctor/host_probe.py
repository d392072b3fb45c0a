"""The program that the doctor runs on every host: reads a request (JSON) from standard input, prints `HostFacts`.

Imports no framework, so that the answer takes a fraction of a second.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from stagdist.cluster.doctor.facts import ROOT, Accelerator, HostFacts, Storage

PACKAGES = ("torch", "deepspeed", "megatron-core")
DRIVER_S = 20
BLOCK_BYTES = 4 << 20
PREFIX = ".stagdist-doctor-"
VISIBLE_S = 5.0
"""Seconds until another host's folder is visible: network file systems cache directory entries."""


def examine(host: str, hosts: list[str], folder: str, checkpoints: str, mark: str, size_mib: int) -> HostFacts:
    """Collect everything about this host.

    Args:
        host: the doctor's name of this host.
        hosts: names of all hosts.
        folder: the doctor's working directory.
        checkpoints: folder of the checkpoints.
        mark: what the doctor made in it.
        size_mib: size of the file that measures the disk, in MiB.
    """
    interfaces = network_interfaces()
    devices, driver = gpus()
    addresses = {name: address_of(name) for name in hosts}
    target = next((name for name in hosts[:2] if name != host), host)
    memory = psutil.virtual_memory()
    return HostFacts(
        hostname=socket.gethostname(),
        versions=versions() | {"driver": driver},
        devices=devices,
        cores=len(os.sched_getaffinity(0)),
        memory_mib=(memory.total >> 20, memory.available >> 20),
        shm_mib=_space_mib(Path("/dev/shm")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        addresses=addresses,
        own_address=address_of(socket.gethostname()),
        interfaces=interfaces,
        route=route_to(addresses[target], interfaces),
        port=free_port(),
        folder=Path(folder).is_dir(),
        storage=examine_storage(Path(checkpoints), Path(mark), size_mib),
    )


# --- software and devices -------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Versions by name; None if a package is not installed."""
    installed = {str(one.metadata["Name"]).lower(): one.version for one in importlib.metadata.distributions()}
    nccl = next((version for name, version in installed.items() if name.startswith("nvidia-nccl")), None)
    packages = {name: installed.get(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages, "nccl": nccl, "code": fingerprint(ROOT / "stagdist")}


def fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that change when any source file changes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def gpus() -> tuple[tuple[Accelerator, ...], str | None]:
    """Devices and driver version from nvidia-smi. The error of a driver that fails takes the place of its version."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None
    query = [program, "--query-gpu=driver_version,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_S)
    except subprocess.TimeoutExpired:
        return (), f"failed: no answer within {DRIVER_S} s"
    if done.returncode:
        complaint = (done.stdout + done.stderr).split("\n")[0].strip()
        return (), f"failed: {complaint[:120] or f'exit code {done.returncode}'}"
    rows = [line.split(", ", 3) for line in done.stdout.splitlines() if line.strip()]
    devices = tuple(Accelerator(name, _mib(total), _mib(free)) for _, total, free, name in rows)
    return devices, rows[0][0] if rows else None


def _mib(text: str) -> int:
    return int(text) if text.isdigit() else 0  # devices that share the host's memory report [N/A]


# --- network --------------------------------------------------------------------------------------------------------


def address_of(name: str) -> str | None:
    """First address of a host name, IPv4 before IPv6; None if the name does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def network_interfaces() -> dict[str, list[str]]:
    """IP addresses by network interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def route_to(address: str | None, interfaces: dict[str, list[str]]) -> str | None:
    """Interface that packets to an address leave through. Sends no packet."""
    if address is None:
        return None
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((address, 9))
            own = sender.getsockname()[0]
    except OSError:
        return None
    return next((name for name, addresses in interfaces.items() if own in addresses), None)


def free_port() -> int:
    """A port without a listener."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


# --- the folder of the checkpoints ----------------------------------------------------------------------------------


def existing(folder: Path) -> Path:
    """The folder or its nearest parent that is there: nothing needs to be made, and removed, to try a file system."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def examine_storage(folder: Path, mark: Path, size_mib: int, visible_s: float = VISIBLE_S) -> Storage:
    """Look for what the doctor made in the folder of the checkpoints, and measure how fast a file reaches the disk.

    Args:
        folder: of the checkpoints.
        mark: what the doctor made.
        size_mib: size of the file, in MiB.
        visible_s: seconds to wait for the mark.
    """
    shared = False
    deadline = time.monotonic() + visible_s
    try:
        while not (shared := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        place = existing(folder)
        # Inside the mark, which the doctor removes also after a host that did not finish.
        with TemporaryDirectory(prefix=PREFIX, dir=mark if shared else place) as made:
            speed = _write_speed(Path(made) / "data", size_mib)
        return Storage(str(folder), shared, "", _file_system(place), _space_mib(place), speed)
    except OSError as error:
        return Storage(str(folder), shared, f"{error.strerror or error}: {error.filename or folder}")


def _write_speed(path: Path, size_mib: int) -> float:
    """10^6 bytes per second, fsync included."""
    block = os.urandom(BLOCK_BYTES)  # a file system cannot compress it
    blocks = max(1, size_mib * 2**20 // BLOCK_BYTES)
    started = time.monotonic()
    with path.open("wb", buffering=0) as stream:
        for _ in range(blocks):
            stream.write(block)
        os.fsync(stream.fileno())
    return blocks * BLOCK_BYTES / (time.monotonic() - started) / 1e6


def _space_mib(folder: Path) -> tuple[int, int]:
    """Size and free space of a file system; zeros if there is none."""
    if not folder.exists():
        return 0, 0
    usage = psutil.disk_usage(str(folder))
    return usage.total >> 20, usage.free >> 20


def _file_system(folder: Path) -> str:
    """Type of the file system that holds a folder."""
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(one.mountpoint)]
    return sorted(mounts, key=lambda one: len(one.mountpoint))[-1].fstype if mounts else ""


if __name__ == "__main__":
    print(examine(**json.load(sys.stdin)).model_dump_json(), flush=True)
