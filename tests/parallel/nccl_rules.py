"""A simulation of NCCL's rules for the programs that ranks would enqueue: which complete, and which hang.

The rules:

- every communicator has one stream, in which its operations run in order, both point-to-point and collectives;
- an operation begins when everything that its rank enqueued on the compute stream before it is done;
- a receive completes after its send has begun, a collective after all members have begun it;
- a send completes immediately if the message fits into NCCL's buffers, otherwise after its receive has begun;
- `wait` makes the compute stream wait, never the host;
- the first launch of a kernel loads it: the host waits until the device is idle;
- the first use of a connection creates it: the host waits until the device is idle (kernels are loaded and buffers
  allocated), then for the hosts at the other ends (of a collective, for those of all members);
- streams that share a hardware queue run in the order in which the host enqueued their operations.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

COMPUTE = "compute"
Stream = Hashable


@dataclass(frozen=True)
class Launch:
    """A kernel on the compute stream. The first one of a name is loaded."""

    name: str


@dataclass(frozen=True)
class Send:
    """A message to `peer` on the communicator `group`."""

    group: Stream
    peer: int


@dataclass(frozen=True)
class Receive:
    """A message from `peer` on the communicator `group`."""

    group: Stream
    peer: int


@dataclass(frozen=True)
class Collective:
    """An operation of all `members` of the communicator `group`."""

    group: Stream
    members: tuple[int, ...]


@dataclass(frozen=True)
class StreamWait:
    """The compute stream waits for the communication with this number, counted over the rank's program."""

    number: int


@dataclass(frozen=True)
class HostWait:
    """The host waits for everything on the compute stream."""


@dataclass(frozen=True)
class Drain:
    """The host waits for the complete device."""


@dataclass(frozen=True)
class HostSend:
    """A message from this host to another host."""

    name: Hashable


@dataclass(frozen=True)
class HostRecv:
    """The host waits for the message of this name from another host."""

    name: Hashable


@dataclass(frozen=True)
class HostBarrier:
    """The hosts of `members` wait for each other."""

    name: Hashable
    members: tuple[int, ...]


Communication = Send | Receive | Collective
Action = Launch | Communication | StreamWait | HostWait | Drain | HostSend | HostRecv | HostBarrier
Program = Sequence[Action]
QueueOf = Callable[[Stream], Hashable]


@dataclass
class Operation:
    """Something on the device of one rank."""

    action: Launch | Communication
    needs: list["Operation"]
    ordinal: int = 0  # among those of its kind, communicator and direction
    begun: bool = False
    done: bool = False


@dataclass
class Device:
    """One rank: the position of its host in the program, and the work of its device."""

    place: int = 0
    queues: dict[Hashable, list[Operation]] = field(default_factory=lambda: defaultdict(list))
    heads: dict[Hashable, int] = field(default_factory=lambda: defaultdict(int))
    last: dict[Stream, Operation] = field(default_factory=dict)
    communications: list[Operation] = field(default_factory=list)
    awaited: list[Operation] = field(default_factory=list)  # by the compute stream, from now on
    counts: dict[Hashable, int] = field(default_factory=lambda: defaultdict(int))
    loaded: set[str] = field(default_factory=set)
    open: int = 0  # operations that are not done


class Machine:
    """Runs one program for each rank.

    Args:
        buffered: sends complete without their receive.
        lazy: kernels are loaded at their first launch, CUDA's default.
        queue_of: hardware queue of a stream; None: one per stream.
        synchronize: the host waits for the device after every action, as a synchronizing tracer would.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        buffered: bool = True,
        lazy: bool = True,
        queue_of: QueueOf | None = None,
        synchronize: bool = False,
    ):
        self._programs, self._buffered, self._lazy, self._synchronize = programs, buffered, lazy, synchronize
        self._queue_of: QueueOf = queue_of or (lambda stream: stream)
        self._devices = [Device() for _ in programs]
        self._begun: dict[Hashable, int] = defaultdict(int)  # operations that have begun, by kind and communicator
        self._sent: set[Hashable] = set()
        self._reached: dict[Hashable, set[int]] = defaultdict(set)

    def play(self) -> list[str]:
        """Where each rank hangs that does not complete; empty if all complete."""
        moved = True
        while moved:
            moved = sum(self._advance(rank) for rank in range(len(self._programs))) > 0
        return [self._stuck(rank) for rank, device in enumerate(self._devices) if not self._ended(rank, device)]

    # --- the host -----------------------------------------------------------------------------------------------

    def _advance(self, rank: int) -> bool:
        device, program, moved = self._devices[rank], self._programs[rank], self._run_device(rank)
        while device.place < len(program) and self._host(rank, device, program[device.place]):
            device.place += 1
            moved = True
            self._run_device(rank)
        return moved

    def _host(self, rank: int, device: Device, action: Action) -> bool:
        """Run one action; False while it has to wait."""
        if self._synchronize and device.open:
            return False
        match action:
            case Launch(name):
                if name not in device.loaded and self._lazy and device.open:
                    return False
                device.loaded.add(name)
                self._enqueue(device, action, COMPUTE, device.awaited)
                device.awaited = []
            case Send() | Receive() | Collective():
                if not self._connected(rank, action):
                    return False
                needs = [device.last[COMPUTE]] if COMPUTE in device.last else []
                device.communications.append(self._enqueue(device, action, action.group, needs + device.awaited))
            case StreamWait(number):
                device.awaited.append(device.communications[number])
            case HostWait():
                needed = [*device.awaited, *filter(None, [device.last.get(COMPUTE)])]
                return all(operation.done for operation in needed)
            case Drain():
                return not device.open
            case HostSend(name):
                self._sent.add(name)
            case HostRecv(name):
                return name in self._sent
            case HostBarrier(name, members):
                self._reached[name].add(rank)
                return self._reached[name] >= set(members)
        return True

    def _connected(self, rank: int, action: Communication) -> bool:
        """Whether the hosts at all ends of a connection have reached its first use."""
        connection: Hashable
        match action:
            case Send(group, peer):
                connection, ends = ("connection", group, rank, peer), {rank, peer}
            case Receive(group, peer):
                connection, ends = ("connection", group, peer, rank), {rank, peer}
            case Collective(group, members):
                connection, ends = ("connection", group), set(members)
        if rank not in self._reached[connection]:
            if self._lazy and self._devices[rank].open:
                return False
            self._reached[connection].add(rank)
        return self._reached[connection] >= ends

    def _enqueue(
        self, device: Device, action: Launch | Communication, stream: Stream, needs: list[Operation]
    ) -> Operation:
        before = [device.last[stream]] if stream in device.last else []
        operation = Operation(action, [*needs, *before])
        if not isinstance(action, Launch):
            kind = (type(action), action.group, getattr(action, "peer", None))
            operation.ordinal = device.counts[kind]
            device.counts[kind] += 1
        device.last[stream] = operation
        device.queues[self._queue_of(stream)].append(operation)
        device.open += 1
        return operation

    # --- the device ---------------------------------------------------------------------------------------------

    def _run_device(self, rank: int) -> bool:
        device, moved, again = self._devices[rank], False, True
        while again:
            again = False
            for name, queue in device.queues.items():
                while device.heads[name] < len(queue) and self._run(rank, queue[device.heads[name]]):
                    device.heads[name] += 1
                    device.open -= 1
                    moved = again = True
        return moved

    def _run(self, rank: int, operation: Operation) -> bool:
        """Begin the oldest operation of a queue if it can; whether it is done."""
        if not operation.begun:
            if not all(needed.done for needed in operation.needs):
                return False
            operation.begun = True
            self._begun[self._key(rank, operation.action)] += 1
        operation.done = self._is_done(rank, operation)
        return operation.done

    def _is_done(self, rank: int, operation: Operation) -> bool:
        match operation.action:
            case Send(group, peer):
                return self._buffered or self._begun["receive", group, rank, peer] > operation.ordinal
            case Receive(group, peer):
                return self._begun["send", group, peer, rank] > operation.ordinal
            case Collective(group, members):
                return all(self._begun["collective", group, member] > operation.ordinal for member in members)
        return True

    @staticmethod
    def _key(rank: int, action: Launch | Communication) -> Hashable:
        match action:
            case Send(group, peer):
                return ("send", group, rank, peer)
            case Receive(group, peer):
                return ("receive", group, peer, rank)
            case Collective(group, _):
                return ("collective", group, rank)
        return ("launch", rank)

    # --- the end ------------------------------------------------------------------------------------------------

    def _ended(self, rank: int, device: Device) -> bool:
        return device.place == len(self._programs[rank]) and not device.open

    def _stuck(self, rank: int) -> str:
        device, program = self._devices[rank], self._programs[rank]
        host = f"its host at {program[device.place]}" if device.place < len(program) else "its host at the end"
        heads = [queue[device.heads[name]].action for name, queue in device.queues.items()
                 if device.heads[name] < len(queue)]  # fmt: skip
        return f"rank {rank} hangs, {host}, its device at {', '.join(map(str, heads)) or 'rest'}"
