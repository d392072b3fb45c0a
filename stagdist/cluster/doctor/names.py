"""Names, addresses and network interfaces as one host sees them."""

import contextlib
import fcntl
import random
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_PORTS = range(20000, 30000)


def address_of(name: str) -> str | None:
    """First address of a host name, IPv4 before IPv6; None where it is not known."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    addresses = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return addresses[0]


def interfaces() -> dict[str, list[str]]:
    """Addresses by network interface."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for name, addresses in found.items():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def route_to(address: str | None, known: dict[str, list[str]]) -> str | None:
    """Interface through which packets to an address leave; sends none."""
    if address is None:
        return None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.connect((address, 9))
            own = sender.getsockname()[0]
    except OSError:
        return None
    return next((name for name, addresses in known.items() if own in addresses), None)


def free_port() -> int:
    """A port that nothing listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
