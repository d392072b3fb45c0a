"""The wire between two network namespaces delays packets of both directions, loses none, and keeps their order."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.slow_wire import SUBNET, wire
from tests.lab.wiring import obstacle

pytestmark = pytest.mark.lab
ECHO = f"""
import socket
link, _ = socket.create_server(("{SUBNET}.1", 5555)).accept()
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := link.recv(65536):
    link.sendall(data)
"""
ASK = f"""
import os, socket, struct, sys, time
while True:
    try:
        link = socket.create_connection(("{SUBNET}.1", 5555))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for latency_s in (0.0, 0.004):
    open(sys.argv[1], "r+b").write(struct.pack("d", latency_s))
    for size in [64] * 9 + [20000]:
        data, found = os.urandom(size), b""
        began_s = time.perf_counter()
        link.sendall(data)
        while len(found) < size:
            found += link.recv(65536)
        assert found == data
        print(latency_s, size, time.perf_counter() - began_s)
"""


def test_a_round_trip_takes_two_latencies() -> None:
    if problem := obstacle():
        pytest.skip(problem)
    with wire() as (made, path):
        enter = [["ip", "netns", "exec", space, sys.executable, "-c"] for space in made.spaces]
        echo = subprocess.Popen([*enter[0], ECHO])
        asked = subprocess.run([*enter[1], ASK, str(path)], capture_output=True, text=True, timeout=60, check=True)
        assert echo.wait(10) == 0
        spaces = [Path("/run/netns") / space for space in made.spaces]
        assert all(space.exists() for space in spaces)
    assert not any(space.exists() for space in spaces), "nothing is left"
    times: dict[float, list[float]] = {0.0: [], 0.004: []}
    for line in asked.stdout.splitlines():
        latency_s, size, time_s = map(float, line.split())
        if size == 64:
            times[latency_s].append(time_s)
    assert min(times[0.004]) >= 0.008
    assert statistics.median(times[0.0]) < 0.004, "the wire itself is fast"
