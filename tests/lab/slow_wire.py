"""`python -m tests.lab.slow_wire`: the benchmark of slow links between two hosts whose wire delays packets (root).

Two network namespaces are joined by a pair of TUN devices. This process carries the packets of each to the other, one
latency late, none before an older one: what `tc netem delay` does, also on kernels without it. The benchmark writes the
latency into a file that both sides share. The rest of the options are those of `benchmarks/slow_links/links.py`.
"""

import fcntl
import mmap
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stagdist.parallel.slow_link import wait_until
from tests.lab.wiring import ROOT, must

SUBNET = "10.78.0"
PORT = 29611
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
LONGEST_PACKET = 65536


class Wire:
    """Two network namespaces and what joins them.

    Args:
        latency_file: holds the latency of each direction, as a double in seconds.

    Attributes:
        spaces: names of the namespaces.
        device: name of the network device in each.
    """

    def __init__(self, latency_file: Path):
        name = f"sg{os.urandom(3).hex()}"
        self.spaces = [f"{name}-w1", f"{name}-w2"]
        self.device = "wire0"
        self._made: list[str] = []
        with latency_file.open("r+b") as stream:
            self._latency = mmap.mmap(stream.fileno(), 8)
        self._ends: list[int] = []
        self._closing = threading.Event()
        try:
            for number, space in enumerate(self.spaces, start=1):
                self._plug_in(f"{name}t{number}", space, f"{SUBNET}.{number}")
        except BaseException:
            self.close()
            raise
        self._carriers = [
            threading.Thread(target=self._carry, args=(*ends,), daemon=True)
            for ends in (self._ends, list(reversed(self._ends)))
        ]
        for carrier in self._carriers:
            carrier.start()

    def close(self) -> None:
        """Remove the namespaces."""
        self._closing.set()
        for space in self._made:
            must("ip", "netns", "del", space)
        for carrier in getattr(self, "_carriers", ()):
            carrier.join()
        for end in self._ends:
            os.close(end)

    def _plug_in(self, device: str, space: str, address: str) -> None:
        """Make a device here, whose packets this process reads and writes, and move it into a namespace."""
        must("ip", "netns", "add", space)
        self._made.append(space)
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._ends.append(end)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
        must("ip", "link", "set", device, "netns", space, "name", self.device)
        must("ip", "-n", space, "addr", "add", f"{address}/24", "dev", self.device)
        must("ip", "-n", space, "link", "set", self.device, "up", "txqueuelen", "1000")
        must("ip", "-n", space, "link", "set", "lo", "up")

    def _carry(self, source: int, target: int) -> None:
        """Carry the packets of one direction until the wire is closed."""
        on_way: deque[tuple[float, bytes]] = deque()
        while not self._closing.is_set():
            wait_s = max(0.0, on_way[0][0] - time.perf_counter()) if on_way else 0.1
            if select.select([source], [], [], max(0.0, wait_s - 1e-4))[0]:
                try:
                    packet = os.read(source, LONGEST_PACKET)
                except OSError:  # the device is going away
                    return
                on_way.append((time.perf_counter() + struct.unpack("d", self._latency)[0], packet))
            while on_way and on_way[0][0] - time.perf_counter() < 1e-4:
                due_s, packet = on_way.popleft()
                wait_until(due_s)
                try:
                    os.write(target, packet)
                except OSError:
                    return


@contextmanager
def wire() -> Iterator[tuple[Wire, Path]]:
    """A wire without latency, and the file that sets it."""
    with tempfile.TemporaryDirectory(prefix="stagdist-wire-") as folder, ExitStack() as stack:
        path = Path(folder) / "latency"
        path.write_bytes(struct.pack("d", 0.0))
        made = Wire(path)
        stack.callback(made.close)
        yield made, path


def start_rank(made: Wire, rank: int, command: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start one of two ranks in its namespace."""
    world = {
        "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": f"{SUBNET}.1",
        "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": made.device, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    settings = [f"{name}={value}" for name, value in world.items()]
    return subprocess.Popen(["ip", "netns", "exec", made.spaces[rank], "env", *settings, *command], cwd=ROOT)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with these options; its exit code."""
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    with wire() as (made, path):
        script = str(ROOT / "benchmarks" / "slow_links" / "links.py")
        ranks = [start_rank(made, rank, [sys.executable, script, "--wire", str(path), *arguments]) for rank in (0, 1)]
        try:
            return max(abs(rank.wait()) for rank in ranks)
        finally:
            for rank in ranks:
                rank.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
