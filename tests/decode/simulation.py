"""Stages that run a schedule without tensors: what blocks what, what each may already know, and when all is done.

`program` writes down what every stage does in a sequence of operations, and `run` plays it. Receives match sends in
order on every edge; a wait ends when its hand-off is there; a send waits only for room among the older ones. Whatever
a schedule must never do raises `ScheduleError`.

A sequence of operations is a text: `s` is a step, `c` a chunk, `e` the last chunk of a prompt, `x` and `y` the same of
a prompt whose positions are scored, `sc` and so on a step with a chunk, `.` an operation without either, `~` and
`s~` as many of `.` and `s` as take a chunk from the first to the last stage, and `R` a rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from stagdist.decode.runtime import schedule
from stagdist.decode.runtime.schedule import Instruction, Kind, Work, WorkPart
from stagdist.decode.topology import Topology

Name = tuple[WorkPart, int]
"""A hand-off, a token or scores: of the step with this number, or of the chunk that entered in this operation."""

CHUNKS_OPEN = 2
COLLECTIVES = {Kind.COMBINE: "combine", Kind.SHARE: "share", Kind.PUBLISH: "token", Kind.TOKEN: "token"}


class ScheduleError(Exception):
    """A schedule that does not work, with the stage and the instruction."""


@dataclass(frozen=True)
class Operation:
    """One operation of all stages.

    Attributes:
        text: `s`, `sc`, `.`, `R` and so on.
        work: for the schedule.
        known: tokens that were chosen in earlier operations.
    """

    text: str
    work: Work
    known: frozenset[Name]

    @property
    def tokens(self) -> list[Name]:
        """Tokens that it chooses, in order."""
        if self.text == "R":
            return []
        found = [] if self.work.step is None else [(WorkPart.STEP, self.work.step)]
        entered = self.work.number - len(self.work.entered) + 1
        found += [(WorkPart.SCORES, entered)] * self.work.scored
        return found + [(WorkPart.CHUNK, entered)] * self.work.ends


def operations(topology: Topology, text: str) -> list[Operation]:
    """Read a sequence of operations."""
    found: list[Operation] = []
    step = first = 0
    chunks = [""] * topology.num_stages  # on their way, the newest first
    known: set[Name] = set()
    for word in text.split():
        for letters in [word.replace("~", "") or "."] * (topology.last_stage if word.endswith("~") else 1):
            chunks = [letters.strip("s.R"), *chunks[:-1]]
            steps = letters.startswith(("s", "R"))
            leaving = "" if letters == "R" else chunks[-1]
            work = Work(
                len(found), step if steps else None, first, tuple(map(bool, chunks)),
                ends=leaving in ("e", "y"), scored=leaving in ("x", "y"),
            )  # fmt: skip
            found.append(Operation(letters, work, frozenset(known)))
            known.update(found[-1].tokens)
            if letters == "R":
                first, chunks = step, [""] * topology.num_stages
            step += letters.startswith("s")
    return found


@dataclass(frozen=True)
class Placed:
    """An instruction at its place in the sequence of operations."""

    operation: Operation
    instruction: Instruction

    @property
    def name(self) -> Name:
        """The hand-off or the token that it is about."""
        return self.instruction.part, self.instruction.number

    def __str__(self) -> str:
        part, number = self.name
        return f"{self.instruction.kind} {part} {number} of {self.operation.text} ({self.operation.work.number})"


Mutation = Callable[[int, list[Instruction]], list[Instruction]]
"""(stage, instructions of one operation) -> what the stage does instead."""


def unchanged(stage: int, instructions: list[Instruction]) -> list[Instruction]:
    """No mutation."""
    return instructions


def program(topology: Topology, text: str, mutate: Mutation = unchanged, *, fixed: bool = False) -> list[list[Placed]]:
    """What every stage does; `fixed`: with steps of fixed shape."""
    placed: list[list[Placed]] = [[] for _ in range(topology.num_stages)]
    for operation in operations(topology, text):
        operation = replace(operation, work=replace(operation.work, fixed=fixed))
        for stage, own in enumerate(placed):
            if operation.text == "R":
                instructions = schedule.rest(topology, stage, operation.work)
            else:
                work, instructions = operation.work, ()
                if fixed and work.step is not None:
                    instructions = schedule.fixed_step(topology, stage, work.step)
                    work = replace(work, step=None)
                instructions += schedule.operation(topology, stage, work)
                instructions += schedule.ending(topology, stage, operation.work)
            own += [Placed(operation, each) for each in mutate(stage, list(instructions))]
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

    sent: list[tuple[Name, float]] = field(default_factory=list)
    posted: list[tuple[Name, float]] = field(default_factory=list)
    waited: set[Name] = field(default_factory=set)
    places: dict[Name, int] = field(default_factory=dict)  # of the first receive of each name in `posted`

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

    tokens: set[Name] = field(default_factory=set)
    memories: set[Name] = field(default_factory=set)
    begun: set[tuple[Name, int]] = field(default_factory=set)  # with the section
    finished: list[tuple[Name, int]] = field(default_factory=list)
    asked: set[Name] = field(default_factory=set)  # tokens whose published tensor has a buffer here
    answered: set[Name] = field(default_factory=set)
    hidden: set[Name] = field(default_factory=set)  # tokens whose combined or shared output is here
    logits: set[Name] = field(default_factory=set)
    chosen: list[Name] = field(default_factory=list)
    published: list[Name] = field(default_factory=list)


class Run:
    """A played program.

    Attributes:
        edges: edge e leads from stage e to e + 1.
        known: by stage.
        token_s: when each stage knew each token.
        places: instructions that each stage got through.
    """

    def __init__(self, topology: Topology, placed: list[list[Placed]], pace: Pace):
        self.topology, self._placed, self._pace = topology, placed, pace
        stages = range(topology.num_stages)
        self.edges = [Edge() for _ in stages[1:]]
        self.known = [Knowledge() for _ in stages]
        self.token_s: list[dict[Name, float]] = [{} for _ in stages]
        self.places = [0 for _ in stages]
        self._clocks = [0.0 for _ in stages]
        self._meetings: dict[tuple[Name, str], dict[int, float]] = {}
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
        now, kind, index = self._clocks[stage], placed.instruction.kind, placed.instruction.index
        if kind is Kind.WAIT:
            edge = self.edges[index]
            if placed.name not in edge.places or placed.name in edge.waited:
                raise ScheduleError(f"stage {stage}: {placed}, which is not expected")
            arrival = edge.arrival(edge.places[placed.name], self._pace.hand_off_s)
            return None if arrival is None else max(now, arrival)
        if kind is Kind.SEND:
            oldest = len(self.edges[index].sent) - 2 - self.topology.lag
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
        present = self._meetings.setdefault((placed.name, name), {})
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
        name, index = placed.name, instruction.index
        if instruction.kind in (Kind.TOKEN, Kind.SHARE) and stage < self.topology.last_stage:
            _need(name in own.asked, stage, placed, "having asked")
            own.answered.add(name)
        match instruction.kind:
            case Kind.ASK:
                _need(own.asked == own.answered, stage, placed, "the answer to what it asked for already")
                own.asked.add(name)
            case Kind.EXPECT:
                self.edges[index].places.setdefault(name, len(self.edges[index].posted))
                self.edges[index].posted.append((name, now))
            case Kind.WAIT:
                self.edges[index].waited.add(name)
                own.memories.add(name)
            case Kind.SEND:
                last = self.topology.sections(stage)[-1]
                _need((name, last) in own.finished, stage, placed, "the output of its last section")
                self.edges[index].sent.append((name, now))
            case Kind.BEGIN:
                self._check_begin(stage, placed)
                own.begun.add((name, index))
            case Kind.FINISH:
                self._check_finish(stage, placed)
                own.finished.append((name, index))
            case Kind.COMBINE | Kind.SHARE:
                self._check_ending(stage, placed)
                if instruction.kind is Kind.SHARE or index in (-1, stage):
                    own.hidden.add(name)
            case Kind.HEAD:
                self._check_ending(stage, placed)
                own.logits.add(name)
            case Kind.CHOOSE:
                _need(name in own.logits, stage, placed, "logits")
                own.chosen.append(name)
                if self.topology.head == "sharded" or self.topology.num_stages == 1:
                    self._know(stage, name)
            case Kind.PUBLISH:
                _need(name in own.chosen, stage, placed, "a token")
                own.published.append(name)
                self._know(stage, name)
            case Kind.TOKEN:
                self._know(stage, name)

    def _know(self, stage: int, name: Name) -> None:
        self.known[stage].tokens.add(name)
        self.token_s[stage][name] = self._clocks[stage]

    def _check_begin(self, stage: int, placed: Placed) -> None:
        _need(placed.operation.known <= self.known[stage].tokens, stage, placed, "the token before")
        if not self.topology.staggered and stage > 0:
            _need(placed.name in self.known[stage].memories, stage, placed, "the output of the stage before")

    def _check_finish(self, stage: int, placed: Placed) -> None:
        own, index, name = self.known[stage], placed.instruction.index, placed.name
        if placed.instruction.part is WorkPart.STEP:
            _need((name, index) in own.begun, stage, placed, "its beginning")
        if stage == 0 or index != self.topology.sections(stage).start:
            return
        if placed.instruction.part is WorkPart.STEP:
            name = WorkPart.STEP, placed.instruction.number - self.topology.lag
            if name[1] < placed.operation.work.first:
                return  # filled by a prompt
        _need(name in own.memories, stage, placed, f"the hand-off {name}")

    def _check_ending(self, stage: int, placed: Placed) -> None:
        topology, own, part = self.topology, self.known[stage], placed.instruction.part
        spread = placed.instruction.kind is Kind.HEAD and (
            topology.combined or (topology.head == "sharded" and topology.num_stages > 1)
        )
        if spread:
            _need(placed.name in own.hidden, stage, placed, "the combined or shared output")
        elif stage == topology.last_stage or topology.combined:
            section = 0 if topology.batched and part is WorkPart.STEP else topology.sections(stage)[-1]
            output = WorkPart.CHUNK if part is WorkPart.SCORES else part, placed.instruction.number
            _need((output, section) in own.finished, stage, placed, "the output of its last section")


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
