"""Stages that run a schedule without tensors: what blocks what, what each may already know, and when all is done.

`program` writes down what every stage does in a sequence of operations, and `run` plays it. Receives match sends in
order on every edge; a wait ends when its hand-off is there; a send waits only for room among the older ones. Whatever
a schedule must never do raises `ScheduleError`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.schedule import Instruction, Kind
from stagdist.decode.topology import Topology

Key = tuple[str, int, int]
"""A hand-off: ("step", number, 0) or ("chunk", operation, chunk)."""

CHUNKS_OPEN = 2
COLLECTIVES = {Kind.COMBINE: "combine", Kind.SHARE: "share", Kind.PUBLISH: "token", Kind.TOKEN: "token"}


class ScheduleError(Exception):
    """A schedule that does not work, with the stage and the instruction."""


@dataclass(frozen=True)
class Operation:
    """One operation of all stages; `chunks` counts those of a prefill."""

    kind: str
    chunks: int = 0


STEP, REST = Operation("step"), Operation("rest")


def admit(chunks: int) -> Operation:
    """The prefill of a prompt."""
    return Operation("prefill", chunks)


@dataclass(frozen=True)
class Placed:
    """An instruction at its place in the sequence of operations."""

    operation: int
    kind_of_operation: str
    instruction: Instruction
    first: int  # first step since the hand-offs were at rest
    before: int | None  # the operation whose token this one feeds

    @property
    def key(self) -> Key:
        """The hand-off that it is about."""
        step = self.instruction.step
        return ("chunk", self.operation, step) if self.kind_of_operation == "prefill" else ("step", step, 0)

    def __str__(self) -> str:
        return f"{self.instruction.kind} {self.key} of {self.kind_of_operation} (operation {self.operation})"


Mutation = Callable[[int, list[Instruction]], list[Instruction]]
"""(stage, instructions of one operation) -> what the stage does instead."""


def program(
    topology: Topology, operations: Sequence[Operation], mutate: Mutation = lambda stage, instructions: instructions
) -> list[list[Placed]]:
    """What every stage does, in order."""
    placed: list[list[Placed]] = [[] for _ in range(topology.num_stages)]
    step = first = 0
    before: int | None = None
    for number, operation in enumerate(operations):
        for stage, own in enumerate(placed):
            match operation.kind:
                case "step":
                    instructions = schedule.decode_step(topology, stage, step, first)
                case "prefill":
                    instructions = schedule.prefill(topology, stage, operation.chunks)
                case _:
                    instructions = schedule.rest(topology, stage, step, first)
            own += [Placed(number, operation.kind, each, first, before) for each in mutate(stage, list(instructions))]
        step += operation.kind == "step"
        first = step if operation.kind == "rest" else first
        before = before if operation.kind == "rest" else number
    return placed


@dataclass(frozen=True)
class Pace:
    """How long things take.

    Attributes:
        duration: of an instruction on a stage, without waiting.
        hand_off_s: from a send to its arrival.
        token_s: from the chosen token to all stages.
        rendezvous: every collective holds every stage until all are there, the strictest that a backend may do.
        dies: (stage, instruction at which it ends).
    """

    duration: Callable[[int, Instruction], float] = lambda stage, instruction: 0.0
    hand_off_s: float = 0.0
    token_s: float = 0.0
    rendezvous: bool = False
    dies: tuple[int, int] | None = None


@dataclass
class Edge:
    """What went from a stage to the next."""

    sent: list[tuple[Key, float]] = field(default_factory=list)
    posted: list[tuple[Key, float]] = field(default_factory=list)
    waited: set[Key] = field(default_factory=set)

    def arrival(self, number: int, delay_s: float) -> float | None:
        """When the hand-off `number` is in its buffer; None while a side is missing."""
        if number >= min(len(self.sent), len(self.posted)):
            return None
        (sent, sent_s), (expected, posted_s) = self.sent[number], self.posted[number]
        if sent != expected:
            raise ScheduleError(f"{sent} arrives where {expected} is expected")
        return max(sent_s + delay_s, posted_s)


@dataclass
class Knowledge:
    """What a stage has."""

    tokens: set[int] = field(default_factory=set)  # operations whose token is known
    memories: set[Key] = field(default_factory=set)
    begun: set[tuple[int, int]] = field(default_factory=set)  # (operation, section)
    finished: list[tuple[int, int, int]] = field(default_factory=list)  # (operation, chunk or step, section)
    asked: set[int] = field(default_factory=set)  # operations whose published tensor has a buffer here
    answered: set[int] = field(default_factory=set)
    hidden: set[int] = field(default_factory=set)  # operations whose combined or shared output is here
    logits: set[int] = field(default_factory=set)
    chosen: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)


class Run:
    """A played program.

    Attributes:
        edges: edge e leads from stage e to e + 1.
        known: by stage.
        token_s: when each stage knew the token of each operation.
        places: instructions that each stage got through.
    """

    def __init__(self, topology: Topology, placed: list[list[Placed]], pace: Pace):
        self.topology, self._placed, self._pace = topology, placed, pace
        stages = range(topology.num_stages)
        self.edges = [Edge() for _ in stages[1:]]
        self.known = [Knowledge() for _ in stages]
        self.token_s: list[dict[int, float]] = [{} for _ in stages]
        self.places = [0 for _ in stages]
        self._clocks = [0.0 for _ in stages]
        self._meetings: dict[tuple[int, str], dict[int, float]] = {}
        while sum(self._advance(stage) for stage in stages):
            pass

    @property
    def stuck(self) -> dict[int, Placed]:
        """The instruction at which each stage that has not come to its end waits."""
        places = enumerate(self.places)
        return {stage: self._placed[stage][place] for stage, place in places if place < len(self._placed[stage])}

    def _advance(self, stage: int) -> bool:
        moved = False
        while self.places[stage] < len(self._placed[stage]) and (stage, self.places[stage]) != self._pace.dies:
            placed = self._placed[stage][self.places[stage]]
            ready = self._ready(stage, placed)
            if ready is None:
                break
            moved = True
            self._clocks[stage] = ready + self._pace.duration(stage, placed.instruction)
            self._do(stage, placed)
            self.places[stage] += 1
        return moved

    def _ready(self, stage: int, placed: Placed) -> float | None:
        """When an instruction's waiting ends; None while it lasts."""
        now = self._clocks[stage]
        kind, index = placed.instruction.kind, placed.instruction.index
        if kind is Kind.WAIT:
            keys = [key for key, _ in self.edges[index].posted]
            if placed.key not in keys or placed.key in self.edges[index].waited:
                raise ScheduleError(f"stage {stage}: {placed}, which is not expected")
            arrival = self.edges[index].arrival(keys.index(placed.key), self._pace.hand_off_s)
            return None if arrival is None else max(now, arrival)
        if kind is Kind.SEND:
            room = CHUNKS_OPEN - 1 if placed.kind_of_operation == "prefill" else self.topology.lag
            oldest = len(self.edges[index].sent) - 1 - room
            if oldest < 0:
                return now
            arrival = self.edges[index].arrival(oldest, self._pace.hand_off_s)
            return None if arrival is None else max(now, arrival)
        return self._meet(stage, placed)

    def _meet(self, stage: int, placed: Placed) -> float | None:
        """As `_ready`, for what stages do together."""
        kind, now, last = placed.instruction.kind, self._clocks[stage], self.topology.last_stage
        if self.topology.num_stages == 1:
            return now
        name = COLLECTIVES.get(kind)
        if kind is Kind.CHOOSE and self.topology.head == "sharded":
            name = "candidates"
        if name is None:
            return now
        present = self._meetings.setdefault((placed.operation, name), {})
        present.setdefault(stage, now)
        latency = self._pace.token_s if name == "token" else 0.0
        if self._pace.rendezvous or name in ("combine", "candidates"):
            if kind is Kind.COMBINE and placed.instruction.index not in (-1, stage) and not self._pace.rendezvous:
                return now  # gives its part and goes on
            return max(present.values()) + latency if len(present) == self.topology.num_stages else None
        return max(now, present[last] + latency) if last in present else None

    # --- what an instruction needs and leaves -------------------------------------------------------------------

    def _do(self, stage: int, placed: Placed) -> None:
        instruction, own, now = placed.instruction, self.known[stage], self._clocks[stage]
        operation, index = placed.operation, instruction.index
        if instruction.kind in (Kind.TOKEN, Kind.SHARE) and stage < self.topology.last_stage:
            _need(operation in own.asked, stage, placed, "having asked")
            own.answered.add(operation)
        match instruction.kind:
            case Kind.ASK:
                _need(own.asked == own.answered, stage, placed, "the answer to what it asked for already")
                own.asked.add(operation)
            case Kind.EXPECT:
                self.edges[index].posted.append((placed.key, now))
            case Kind.WAIT:
                self.edges[index].waited.add(placed.key)
                own.memories.add(placed.key)
            case Kind.SEND:
                self._check_output(stage, placed)
                self.edges[index].sent.append((placed.key, now))
            case Kind.BEGIN:
                self._check_begin(stage, placed)
                own.begun.add((operation, index))
            case Kind.FINISH:
                self._check_finish(stage, placed)
                own.finished.append((operation, instruction.step, index))
            case Kind.COMBINE | Kind.SHARE:
                self._check_ending(stage, placed)
                if instruction.kind is Kind.SHARE or index in (-1, stage):
                    own.hidden.add(operation)
            case Kind.HEAD:
                self._check_ending(stage, placed)
                own.logits.add(operation)
            case Kind.CHOOSE:
                _need(operation in own.logits, stage, placed, "logits")
                own.chosen.append(operation)
                if self.topology.head == "sharded" or self.topology.num_stages == 1:
                    self._know(stage, operation)
            case Kind.PUBLISH:
                _need(operation in own.chosen, stage, placed, "a token")
                own.published.append(operation)
                self._know(stage, operation)
            case Kind.TOKEN:
                self._know(stage, operation)

    def _know(self, stage: int, operation: int) -> None:
        self.known[stage].tokens.add(operation)
        self.token_s[stage][operation] = self._clocks[stage]

    def _check_begin(self, stage: int, placed: Placed) -> None:
        known = placed.before is None or placed.before in self.known[stage].tokens
        _need(known, stage, placed, "the token before")
        if not self.topology.staggered and stage > 0:
            _need(placed.key in self.known[stage].memories, stage, placed, "the output of the stage before")

    def _check_finish(self, stage: int, placed: Placed) -> None:
        own, index = self.known[stage], placed.instruction.index
        if placed.kind_of_operation == "step":
            _need((placed.operation, index) in own.begun, stage, placed, "its beginning")
        if stage == 0 or index != self.topology.sections(stage).start:
            return
        key = placed.key
        if placed.kind_of_operation == "step":
            needed = placed.instruction.step - self.topology.lag
            if needed < placed.first:
                return  # filled by a prefill
            key = ("step", needed, 0)
        _need(key in own.memories, stage, placed, f"the hand-off {key}")

    def _check_output(self, stage: int, placed: Placed) -> None:
        last = self.topology.sections(stage)[-1]
        output = (placed.operation, placed.instruction.step, last)
        _need(output in self.known[stage].finished, stage, placed, "the output of its last section")

    def _check_ending(self, stage: int, placed: Placed) -> None:
        topology, own = self.topology, self.known[stage]
        spread = placed.instruction.kind is Kind.HEAD and (
            topology.combined or (topology.head == "sharded" and topology.num_stages > 1)
        )
        if spread:
            _need(placed.operation in own.hidden, stage, placed, "the combined or shared output")
        elif stage == topology.last_stage or topology.combined:
            section = 0 if topology.batched and placed.kind_of_operation == "step" else topology.sections(stage)[-1]
            output = (placed.operation, placed.instruction.step, section)
            _need(output in own.finished, stage, placed, "the output of its last section")


def _need(there: bool, stage: int, placed: Placed, what: str) -> None:
    if not there:
        raise ScheduleError(f"stage {stage}: {placed} without {what}")


def run(topology: Topology, placed: list[list[Placed]], pace: Pace | None = None) -> Run:
    """Play a program to its end.

    Raises:
        ScheduleError: stages wait for each other, or something is used before it is there.
    """
    pace = pace or Pace()
    played = Run(topology, placed, pace)
    if played.stuck and pace.dies is None:
        raise ScheduleError("; ".join(f"stage {stage} waits at {each}" for stage, each in played.stuck.items()))
    return played
