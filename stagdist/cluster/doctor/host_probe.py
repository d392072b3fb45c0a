"""What the doctor runs on every host: reads a question (JSON) from standard input, prints one marked line of JSON.

Imports no torch, so an answer takes a fraction of a second.
"""

import ctypes
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
from pathlib import Path
from typing import Any

import stagdist
from stagdist.cluster.doctor import names, storage
from stagdist.cluster.doctor.facts import Device, HostFacts

MARK = "STAGDIST-HOST "
"""Begins the answer; a login script may print other lines."""

PACKAGES = ("torch", "deepspeed", "megatron-core")
DRIVER_S = 20


def examine(question: dict[str, Any]) -> dict[str, Any]:
    """Everything about this host that needs no other one."""
    known = names.interfaces()
    devices, driver = gpus()
    first, second = (question["hosts"] * 2)[:2]
    target = second if question["host"] == first else first
    addresses = {name: names.address_of(name) for name in question["hosts"]}
    kept = None
    if question["checkpoints"]:
        kept = storage.write(
            Path(question["checkpoints"]), *(question[key] for key in ("token", "host", "content", "mib"))
        )
    facts = HostFacts(
        hostname=socket.gethostname(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES} | {"nccl": nccl()},
        code=fingerprint(Path(stagdist.__file__).parent),
        driver=driver,
        devices=devices,
        cores=len(os.sched_getaffinity(0)),
        memory_mib=memory_mib(Path("/proc/meminfo").read_text()),
        shm_mib=_space("/dev/shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        addresses=addresses,
        own_address=names.address_of(socket.gethostname()),
        interfaces=known,
        route=names.route_to(addresses[target], known),
        free_port=names.free_port(),
        folder=Path(question["folder"]).is_dir(),
        storage=kept,
    )
    return facts.to_json()


def read(question: dict[str, Any]) -> dict[str, Any]:
    """What the files that all hosts wrote hold here."""
    return storage.read(Path(question["checkpoints"]), question["token"], question["hosts"])


def clean(question: dict[str, Any]) -> dict[str, Any]:
    """Remove what `examine` wrote."""
    storage.clean(Path(question["checkpoints"]), question["token"], question["created"])
    return {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nccl() -> str | None:
    """Version of the NCCL that torch brings, or else of the system's."""
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
    """Twelve digits that differ when any source file does."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def gpus() -> tuple[tuple[Device, ...], str | None]:
    """Devices and driver as nvidia-smi shows them; none where it is not installed or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None
    query = [program, "--query-gpu=driver_version,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_S)
    except subprocess.TimeoutExpired:
        return (), f"silent for {DRIVER_S} s"
    if done.returncode:
        complaint = (done.stdout + done.stderr).split("\n")[0].strip()
        return (), f"failed: {complaint[:120] or f'exit code {done.returncode}'}"
    rows = [line.split(", ", 3) for line in done.stdout.splitlines() if line.strip()]
    devices = tuple(Device(name, _number(total), _number(free)) for _, total, free, name in rows)
    return devices, rows[0][0] if rows else None


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # some devices share the host's memory and say [N/A]


def memory_mib(meminfo: str) -> tuple[int, int]:
    """Total and available memory."""
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    total, available = (int(fields[key].split()[0]) >> 10 for key in ("MemTotal", "MemAvailable"))
    return total, available


def _space(path: str) -> tuple[int, int]:
    try:
        status = os.statvfs(path)
    except OSError:
        return 0, 0
    return status.f_blocks * status.f_frsize >> 20, status.f_bavail * status.f_frsize >> 20


def main() -> int:
    """Answer one question."""
    question = json.loads(sys.stdin.readline())
    answer = {"examine": examine, "read": read, "clean": clean}[question["action"]](question)
    print(MARK + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
