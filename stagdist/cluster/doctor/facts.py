"""What the doctor finds out, as plain data: of hosts, of links between ranks, and what is wrong with either."""

from dataclasses import dataclass, field

PROBLEM = "problem"
NOTE = "note"


@dataclass(frozen=True)
class Accelerator:
    """One accelerator.

    Attributes:
        name: as its driver calls it.
        total_mib: memory, in MiB.
        free_mib: of it free.
    """

    name: str
    total_mib: int
    free_mib: int


@dataclass(frozen=True)
class Storage:
    """The folder of the checkpoints as one host sees it.

    Attributes:
        path: absolute.
        problem: why nothing can be written there; empty when all is well.
        kind: type of the file system, for example nfs4.
        total_mib: size of the file system.
        free_mib: of it free.
        write_mb_s: 10^6 bytes per second, while all hosts write, with what it takes to be safe on the disk.
        created: folders that were made for the examination, outermost first.
    """

    path: str
    problem: str = ""
    kind: str = ""
    total_mib: int = 0
    free_mib: int = 0
    write_mb_s: float = 0.0
    created: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostFacts:
    """Facts about one host.

    Attributes:
        hostname: its own idea of its name.
        python: version.
        packages: version by name; None where it is missing.
        code: fingerprint of stagdist's source files.
        driver: version of the GPU driver.
        devices: accelerators that the driver shows.
        cores: that a process may use.
        memory_mib: total and available.
        shm_mib: size and free space of /dev/shm.
        open_files: soft and hard limit.
        addresses: of every host by name; None where the name is not known.
        own_address: of its hostname.
        interfaces: addresses by network interface.
        route: interface on the way to the first host (from there, to the second).
        free_port: one that nothing listens on.
        folder: whether the launcher's working directory is there.
        storage: the folder of the checkpoints.
    """

    hostname: str
    python: str
    packages: dict[str, str | None]
    code: str
    driver: str | None
    devices: tuple[Accelerator, ...]
    cores: int
    memory_mib: tuple[int, int]
    shm_mib: tuple[int, int]
    open_files: tuple[int, int]
    addresses: dict[str, str | None]
    own_address: str | None
    interfaces: dict[str, list[str]]
    route: str | None
    free_port: int
    folder: bool = True
    storage: Storage | None = None

    @property
    def own_interface(self) -> str | None:
        """Interface that carries the address of the own name: the one that gloo uses by default."""
        address = self.own_address
        if address is not None and address.startswith("127."):
            return "lo"
        return next((name for name, addresses in self.interfaces.items() if address in addresses), None)


@dataclass(frozen=True)
class ClockOffset:
    """A host's clock against the one of the machine where the doctor runs.

    Attributes:
        offset_s: positive when the host is ahead.
        error_s: how far off that may be, half the shortest round trip.
    """

    offset_s: float
    error_s: float


@dataclass(frozen=True)
class Boundary:
    """Two ranks of neighboring stages.

    Attributes:
        stage: of the first rank.
        ranks: the sending and the receiving one, in the direction of the activations.
        latency_s: half a round trip of a small message.
        forward_bytes_s: bytes per second in the direction of the activations.
        backward_bytes_s: in the direction of the gradients.
    """

    stage: int
    ranks: tuple[int, int]
    latency_s: float
    forward_bytes_s: float
    backward_bytes_s: float


@dataclass(frozen=True)
class Reduction:
    """All-reduce of one group.

    Attributes:
        axis: data, tensor or all.
        ranks: of the group.
        latency_s: of one small number.
        bytes_s: size of a large tensor over the time.
        correct: whether the sum was right.
    """

    axis: str
    ranks: tuple[int, ...]
    latency_s: float
    bytes_s: float
    correct: bool


@dataclass(frozen=True)
class Links:
    """What the ranks measured.

    Attributes:
        grid: stages, data and tensor sizes.
        backend: nccl or gloo.
        hosts: host name by rank.
        devices: by rank.
        boundaries: of all stages.
        reductions: of all groups of more than one rank.
    """

    grid: tuple[int, int, int]
    backend: str
    hosts: tuple[str, ...]
    devices: tuple[str, ...]
    boundaries: tuple[Boundary, ...]
    reductions: tuple[Reduction, ...]


@dataclass(frozen=True)
class Finding:
    """A problem or note for the user.

    Attributes:
        level: PROBLEM or NOTE.
        row: line of the table it belongs to.
        hosts: where; empty for all or none in particular.
        what: is wrong, with values.
        remedy: what to do.
    """

    level: str
    row: str
    hosts: tuple[str, ...]
    what: str
    remedy: str

    def __str__(self) -> str:
        where = f"{', '.join(self.hosts[:6])}{' ...' if len(self.hosts) > 6 else ''}: " if self.hosts else ""
        return f"{self.level}: {where}{self.what}; {self.remedy}"


@dataclass(frozen=True)
class Survey:
    """Everything that was found out.

    Attributes:
        hosts: names in the order of their ranks.
        slots: ranks by host.
        facts: of the hosts that answered.
        silent: why the others did not.
        clocks: of the hosts that answered.
        seen: reading host -> writing host -> whether the file written there was read here.
        interface: GLOO_SOCKET_IFNAME that ranks will get.
        fixed: whether the doctor set `interface` itself, in the file that it wrote.
        links: what the ranks measured.
        links_problem: why they did not.
        other: findings made on the way.
    """

    hosts: tuple[str, ...]
    slots: dict[str, int]
    facts: dict[str, HostFacts]
    silent: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, ClockOffset] = field(default_factory=dict)
    seen: dict[str, dict[str, bool]] = field(default_factory=dict)
    interface: str | None = None
    fixed: bool = False
    links: Links | None = None
    links_problem: str = ""
    other: tuple[Finding, ...] = ()
