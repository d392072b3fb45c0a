"""What the doctor finds out, as plain data: of hosts, of links between ranks, and what is wrong with either."""

from dataclasses import dataclass, field

PROBLEM = "problem"
NOTE = "note"


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
    problem: str = ""  # why nothing can be written there; empty when all is well
    kind: str = ""  # type of the file system, for example nfs4
    total_mib: int = 0  # size of the file system
    free_mib: int = 0  # of it free
    write_mb_s: float = 0.0  # 10^6 bytes per second, while all hosts write, with what it takes to be safe on the disk
    created: tuple[str, ...] = ()  # folders that were made for the examination, outermost first


@dataclass(frozen=True)
class HostFacts:
    """Facts about one host."""

    hostname: str  # its own idea of its name
    python: str  # version
    packages: dict[str, str | None]  # version by name; None where it is missing
    code: str  # fingerprint of stagdist's source files
    driver: str | None  # version of the GPU driver
    devices: tuple[Accelerator, ...]  # accelerators that the driver shows
    cores: int  # that a process may use
    memory_mib: tuple[int, int]  # total and available
    shm_mib: tuple[int, int]  # size and free space of /dev/shm
    open_files: tuple[int, int]  # soft and hard limit
    addresses: dict[str, str | None]  # of every host by name; None where the name is not known
    own_address: str | None  # of its hostname
    interfaces: dict[str, list[str]]  # addresses by network interface
    route: str | None  # interface on the way to the first host (from there, to the second)
    free_port: int  # one that nothing listens on
    folder: bool = True  # whether the launcher's working directory is there
    storage: Storage | None = None  # the folder of the checkpoints

    @property
    def own_interface(self) -> str | None:
        """Interface that carries the address of the own name: the one that gloo uses by default."""
        address = self.own_address
        if address is not None and address.startswith("127."):
            return "lo"
        return next((name for name, addresses in self.interfaces.items() if address in addresses), None)


@dataclass(frozen=True)
class ClockOffset:
    """A host's clock against the one of the machine where the doctor runs."""

    offset_s: float  # positive when the host is ahead
    error_s: float  # how far off that may be, half the shortest round trip


@dataclass(frozen=True)
class Boundary:
    """Two ranks of neighboring stages."""

    stage: int  # of the first rank
    ranks: tuple[int, int]  # the sending and the receiving one, in the direction of the activations
    latency_s: float  # half a round trip of a small message
    forward_bytes_s: float  # bytes per second in the direction of the activations
    backward_bytes_s: float  # in the direction of the gradients


@dataclass(frozen=True)
class Reduction:
    """All-reduce of one group."""

    axis: str  # data, tensor or all
    ranks: tuple[int, ...]  # of the group
    latency_s: float  # of one small number
    bytes_s: float  # size of a large tensor over the time
    correct: bool  # whether the sum was right


@dataclass(frozen=True)
class Links:
    """What the ranks measured."""

    grid: tuple[int, int, int]  # stages, data and tensor sizes
    backend: str  # nccl or gloo
    hosts: tuple[str, ...]  # host name by rank
    devices: tuple[str, ...]  # by rank
    boundaries: tuple[Boundary, ...]  # of all stages
    reductions: tuple[Reduction, ...]  # of all groups of more than one rank


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


@dataclass(frozen=True)
class Survey:
    """Everything that was found out."""

    hosts: tuple[str, ...]  # names in the order of their ranks
    slots: dict[str, int]  # ranks by host
    facts: dict[str, HostFacts]  # of the hosts that answered
    silent: dict[str, str] = field(default_factory=dict)  # why the others did not
    clocks: dict[str, ClockOffset] = field(default_factory=dict)  # of the hosts that answered
    # reading host -> writing host -> whether the file written there was read here
    seen: dict[str, dict[str, bool]] = field(default_factory=dict)
    interface: str | None = None  # GLOO_SOCKET_IFNAME that ranks will get
    fixed: bool = False  # whether the doctor set `interface` itself, in the file that it wrote
    links: Links | None = None  # what the ranks measured
    links_problem: str = ""  # why they did not
    other: tuple[Finding, ...] = ()  # findings made on the way
