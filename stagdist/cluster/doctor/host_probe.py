"""The program that the doctor runs on every host: reads a request (JSON) from standard input, prints one line of JSON.

Imports no framework, so an answer takes a fraction of a second.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

import stagdist
from stagdist.cluster.doctor.facts import Accelerator, HostFacts, Storage

ANSWER_PREFIX = "STAGDIST-HOST "
"""First characters of the answer. A login script may print other lines."""

PACKAGES = ("torch", "deepspeed", "megatron-core")
DRIVER_S = 20
BLOCK_BYTES = 4 << 20
VISIBLE_S = 5.0
"""Seconds to wait for a file written by another host: network file systems cache directory entries."""

_PORTS = range(20000, 30000)


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """Collect everything about this host that does not depend on other hosts."""
    interfaces = network_interfaces()
    devices, driver = gpus()
    first, second = (request["hosts"] * 2)[:2]
    target = second if request["host"] == first else first
    addresses = {name: address_of(name) for name in request["hosts"]}
    storage = None
    if request["checkpoints"]:
        path = Path(request["checkpoints"])
        storage = write_files(path, request["token"], request["host"], request["content"], request["mib"])
    memory = psutil.virtual_memory()
    facts = HostFacts(
        hostname=socket.gethostname(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES} | {"nccl": nccl()},
        code=fingerprint(Path(stagdist.__file__).parent),
        driver=driver,
        devices=devices,
        cores=len(os.sched_getaffinity(0)),
        memory_mib=(memory.total >> 20, memory.available >> 20),
        shm_mib=_space_mib(Path("/dev/shm")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        addresses=addresses,
        own_address=address_of(socket.gethostname()),
        interfaces=interfaces,
        route=route_to(addresses[target], interfaces),
        free_port=free_port(),
        folder=Path(request["folder"]).is_dir(),
        storage=storage,
    )
    return asdict(facts)


# --- software and devices -------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nccl() -> str | None:
    """Version of the NCCL package that torch depends on, or of the system's NCCL."""
    for distribution in importlib.metadata.distributions():
        if (distribution.metadata["Name"] or "").startswith("nvidia-nccl"):
            return distribution.version
    try:
        version = ctypes.c_int()
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    number = version.value
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that change when any source file changes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def gpus() -> tuple[tuple[Accelerator, ...], str | None]:
    """Devices and driver version from nvidia-smi. A driver that fails is reported in place of its version."""
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
    return {
        name: [
            entry.address.partition("%")[0] for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
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
    """A port without a listener, below the range that the kernel uses for outgoing connections."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


# --- the folder of the checkpoints ----------------------------------------------------------------------------------


def write_files(folder: Path, token: str, name: str, content: str, size_mib: int) -> Storage:
    """Write a small file for the other hosts to read, and measure how fast a large one reaches the disk."""
    created: list[str] = []
    try:
        for missing in [path for path in [*reversed(folder.parents), folder] if not path.exists()]:
            with contextlib.suppress(FileExistsError):  # created by another host
                missing.mkdir()
                created.append(str(missing))
        test_folder = _test_folder(folder, token)
        test_folder.mkdir(exist_ok=True)
        speed = _write_speed(test_folder / f"{name}.data", size_mib)
        (test_folder / name).write_text(content)
        total, free = _space_mib(folder)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or folder}"
        return Storage(str(folder), reason, created=tuple(created))
    return Storage(str(folder), "", _file_system(folder), total, free, speed, tuple(created))


def _test_folder(folder: Path, token: str) -> Path:
    return folder / f".stagdist-doctor-{token}"


def _write_speed(path: Path, size_mib: int) -> float:
    """10^6 bytes per second, fsync included."""
    block = os.urandom(BLOCK_BYTES)  # a file system cannot compress it
    blocks = max(1, size_mib * 2**20 // BLOCK_BYTES)
    started = time.monotonic()
    try:
        with path.open("wb", buffering=0) as stream:
            for _ in range(blocks):
                stream.write(block)
            os.fsync(stream.fileno())
        return blocks * BLOCK_BYTES / (time.monotonic() - started) / 1e6
    finally:
        path.unlink(missing_ok=True)


def _space_mib(folder: Path) -> tuple[int, int]:
    """Size and free space of a file system; zeros if there is none."""
    if not folder.exists():
        return 0, 0
    usage = shutil.disk_usage(folder)
    return usage.total >> 20, usage.free >> 20


def _file_system(folder: Path) -> str:
    """Type of the file system that holds a folder."""
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(one.mountpoint)]
    return sorted(mounts, key=lambda one: len(one.mountpoint))[-1].fstype if mounts else ""


def read_files(folder: Path, token: str, names: list[str], timeout_s: float = VISIBLE_S) -> dict[str, str | None]:
    """Contents of the files that all hosts wrote; None for a file that cannot be read within the time limit."""
    deadline = time.monotonic() + timeout_s
    found: dict[str, str | None] = dict.fromkeys(names)
    while True:
        for name in names:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found[name] = (_test_folder(folder, token) / name).read_text()
        if None not in found.values() or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def remove_files(folder: Path, token: str, created: list[str]) -> None:
    """Remove the test files, and the folders created for them if nothing else is in them."""
    shutil.rmtree(_test_folder(folder, token), ignore_errors=True)
    for path in reversed(created):
        with contextlib.suppress(OSError):
            Path(path).rmdir()


def main() -> int:
    """Answer one request."""
    request = json.loads(sys.stdin.readline())
    answer: dict[str, Any] = {}
    match request["action"]:
        case "examine":
            answer = examine(request)
        case "read":
            answer = read_files(Path(request["checkpoints"]), request["token"], request["hosts"])
        case "clean":
            remove_files(Path(request["checkpoints"]), request["token"], request["created"])
        case action:
            raise KeyError(action)
    print(ANSWER_PREFIX + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
