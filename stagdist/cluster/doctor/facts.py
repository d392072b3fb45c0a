"""What the doctor finds out, as plain data: facts about hosts, links between ranks, and findings.

Pydantic models cross process boundaries as JSON; the dataclasses are parts of them.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

PROBLEM = "problem"
NOTE = "note"

ALONE = "localhost"
"""Name of this machine. It is examined without ssh."""

ROOT = Path(__file__).resolve().parents[3]
"""Folder that holds the package. It must be at the same path on all hosts."""


@dataclass(frozen=True)
class Accelerator:
    """One accelerator."""

    name: str  # as its driver calls it
    total_mib: int  # memory, in MiB
    free_mib: int  # of it free


@dataclass(frozen=True)
class Storage:
    """The folder of the checkpoints as one host sees it."""

    path: str  # absolute
    shared: bool  # whether the host sees what the doctor made there
    problem: str = ""  # why nothing can be written there; empty if it can
    kind: str = ""  # type of the file system, for example nfs4
    space_mib: tuple[int, int] = (0, 0)  # size of the file system, and free
    write_mb_s: float = 0.0  # 10^6 bytes per second, while all hosts write, fsync included


class HostFacts(BaseModel, frozen=True):
    """What a host reports about itself."""

    hostname: str  # its own idea of its name
    versions: dict[str, str | None]  # by row of the table; None if missing. Should be the same on all hosts
    devices: tuple[Accelerator, ...]  # accelerators that the driver shows
    cores: int  # that a process may use
    memory_mib: tuple[int, int]  # total and available
    shm_mib: tuple[int, int]  # size and free space of /dev/shm
    open_files: tuple[int, int]  # soft and hard limit
    addresses: dict[str, str | None]  # of every host by name; None if the name is not known
    own_address: str | None  # of its hostname
    interfaces: dict[str, list[str]]  # addresses by network interface
    route: str | None  # interface on the way to the first host (from there, to the second)
    port: int  # one that nothing listens on
    folder: bool  # whether the doctor's working directory is there
    storage: Storage  # the folder of the checkpoints
    clock_offset_s: float = 0.0  # positive if its clock is ahead of the doctor's, which measures it
    clock_error_s: float = 0.0  # largest error of the offset

    @property
    def own_interface(self) -> str | None:
        """Interface that carries the address of the own name, which gloo uses by default."""
        if self.own_address is not None and self.own_address.startswith("127."):
            return "lo"
        return next((name for name, addresses in self.interfaces.items() if self.own_address in addresses), None)


@dataclass(frozen=True)
class Link:
    """All-reduce of a group of ranks. A stage boundary is a group of two."""

    axis: str  # pipe, tensor or data, or all for all ranks
    ranks: tuple[int, ...]  # of the group
    latency_s: float  # of one small number
    bytes_s: float  # size of a large tensor over the time, in bytes per second
    correct: bool  # whether the sum was right

    def __str__(self) -> str:
        return f"{self.latency_s * 1e3:.2f} ms, {self.bytes_s / 1e6:.0f} MB/s"


class LinkReport(BaseModel, frozen=True):
    """What the ranks measured."""

    grid: tuple[int, int, int]  # stages, data and tensor sizes
    backend: str  # nccl or gloo
    hosts: tuple[str, ...]  # host name by rank
    devices: tuple[str, ...]  # by rank
    links: tuple[Link, ...]  # of all groups of more than one rank


@dataclass(frozen=True)
class Finding:
    """A problem or note for the user."""

    level: str  # PROBLEM or NOTE
    row: str  # line of the table it belongs to
    hosts: tuple[str, ...]  # where; empty for all or none in particular
    what: str  # is wrong, with values
    remedy: str  # what to do

    def __str__(self) -> str:
        where = f"{', '.join(self.hosts[:6])}{' ...' if len(self.hosts) > 6 else ''}: " if self.hosts else ""
        return f"{self.level}: {where}{self.what}; {self.remedy}"


class Survey(BaseModel, frozen=True):
    """Everything that was found out."""

    hosts: tuple[str, ...]  # names in the order of their ranks
    slots: dict[str, int]  # ranks by host
    facts: dict[str, HostFacts]  # of the hosts that answered
    silent: dict[str, str] = {}  # why the others did not
    interface: str | None = None  # GLOO_SOCKET_IFNAME that ranks will get
    links: LinkReport | None = None  # what the ranks measured
    links_problem: str = ""  # why they did not
    environment: tuple[Finding, ...] = ()  # findings about the variables of the ranks
