"""Comparison of replicas: a difference that shows nowhere else stops the run before anything is saved.

A host that computes or copies a value wrongly raises no error, and the loss keeps falling. Three things are compared:

- **Weights of data-parallel replicas**, by a hash of every parameter. One replica computes each value and all others
  receive it, so a single different bit is a fault.
- **Copies of a parameter on other stages or tensor ranks** (tied and shared weights, norms), by a projection. Every
  copy has its own sum of gradients, which NCCL may add in another order, so copies may differ by rounding.
- **The reduction of gradients**, by a projection. Under ZeRO-1 a rank receives only the part of the mean that it owns,
  so there are no two results to compare. A projection is linear: what the owners have received must have the mean of
  the projections that the replicas had before.
"""

import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.errors import TrainingError
from stagdist.parallel.grid import Grid
from stagdist.parallel.groups import Groups
from stagdist.parallel.layout import stage_layout, stage_parameters
from stagdist.training.engine.agreement import shared
from stagdist.training.engine.deepspeed_adapter import owned_gradient, owned_part
from stagdist.training.engine.section_engine import SectionEngine

GRADIENT_TOLERANCE = 0.02
"""Allowed difference of two projections, relative to the length of what is projected. Rounding in fp32 is 1e-7, in
16 bits 2e-3; the difference between the gradients of two replicas is about 1."""
COPY_TOLERANCES = {2: 1e-3, 4: 1e-5}
"""The same for copies, by bytes of a value. Sums in another order differ by 1e-7; in 16 bits, a few values are then
rounded to the next number."""
CHUNK = 1 << 20
"""Values that are widened to 64 bits at a time."""
NAMED = 3
"""Parameters that an error names; it counts the others."""

WEIGHTS, COPIES, GRADIENT = "weights", "copies", "gradient"

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as int64: multiples of it have top bits without a pattern."""


def weight_hash(values: Tensor) -> Tensor:
    """int64 scalar from all bits and their positions: it changes with any one value, and when two are exchanged."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part, positions in _chunks(values.detach().flatten().view(_BITS[values.element_size()])):
        total += (part.long() * (2 * positions + 1)).sum()
    return total


def projection(values: Tensor, start: int = 0) -> Tensor:
    """float64 [2]: the sum with pseudo-random signs, and the squared length.

    A plain sum would not do: that of the head's gradient is 0.

    Args:
        start: position of the first value in its parameter, which determines the signs.
    """
    total = torch.zeros(2, dtype=torch.float64, device=values.device)
    for part, positions in _chunks(values.detach().flatten(), start):
        wide, signs = part.double(), (positions * _GOLDEN >> 63 | 1).double()
        total += torch.stack((wide @ signs, wide @ wide))
    return total


def _chunks(flat: Tensor, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    for begin in range(0, flat.numel(), CHUNK):
        part = flat[begin : begin + CHUNK]
        yield part, torch.arange(start + begin, start + begin + part.numel(), device=flat.device)


def copies_in_replica(model: ModelConfig, grid: Grid) -> dict[tuple[str, int], list[int]]:
    """Parameters that several ranks of one replica hold, and these ranks of the first replica.

    The key is the canonical name and the tensor rank, 0 for a parameter that tensor ranks do not split.
    """
    holders: dict[tuple[str, int], list[int]] = defaultdict(list)
    for stage in range(grid.pipe):
        for spec in stage_parameters(model, grid.pipe, stage):
            names = [spec.name]
            if spec.name == "section_mix":  # each stage holds the values of its sections
                names = [f"section_mix.{section}" for section in stage_layout(model, grid.pipe, stage).sections]
            for name in names:
                for tensor in range(grid.tensor):
                    key = name, tensor if spec.shard_dim is not None else 0
                    holders[key].append(grid.rank(stage, 0, tensor))
    return {key: ranks for key, ranks in holders.items() if len(ranks) > 1}


class Difference(NamedTuple):
    """A parameter that differs, as one rank holds it.

    Attributes:
        kind: WEIGHTS, COPIES or GRADIENT.
        ranks: those that should hold the same.
        value: equal on two ranks that do.
    """

    kind: str
    name: str
    ranks: tuple[int, ...]
    value: int = 0


class _Step(NamedTuple):
    """What was seen of a step, on the device.

    Attributes:
        hashes: int64 [3, parameters]: of this rank, the largest of all replicas, the largest of all inverted.
        copies: projections of this rank's copies, by name and tensor rank.
        gradients: float64 [parameters, 3]: mean projection and mean squared length before the reduction, and the
            projection after it.
    """

    hashes: Tensor
    copies: dict[tuple[str, int], Tensor]
    gradients: Tensor


class Audit:
    """Compares the replicas of a run. Every method but `due` is called on all ranks at the same time.

    Args:
        every_steps: `training.audit_steps`.
    """

    def __init__(self, engine: SectionEngine, groups: Groups, model: ModelConfig, every_steps: int):
        self._engine, self._groups, self._every_steps = engine, groups, every_steps
        self._parameters = engine.module.canonical_parameters()
        self._replicas: dist.ProcessGroup = engine.mpu.get_data_parallel_group()
        self._copies = copies_in_replica(model, groups.grid)
        self._step: _Step | None = None

    def due(self, step: int) -> bool:
        """Whether this step is audited."""
        return self._every_steps > 0 and step % self._every_steps == 0

    @torch.no_grad()
    def watch_reduction(self, reduce: Callable[[], None]) -> None:
        """Run the reduction of gradients, and keep what `compare` needs. The host does not wait for the device.

        These are the weights that the step has used: after the update all of them are gathered anew, which would hide
        what happened to them.
        """
        parameters = self._parameters.values()
        mine = torch.stack([weight_hash(parameter) for parameter in parameters])
        extremes = torch.stack((mine, ~mine))
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._replicas)
        copies = {key: projection(self._parameters[key[0]]) for key in self._copies if self._holds(key)}
        nothing = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        gradients = [self._engine.unreduced_gradient(parameter) for parameter in parameters]
        before = torch.stack([nothing if gradient is None else projection(gradient) for gradient in gradients])
        reduce()
        owned = [owned_gradient(parameter) for parameter in parameters]
        after = torch.stack([nothing if part is None else projection(part.values, part.start) for part in owned])
        sums = torch.cat((before / self._groups.grid.data, after[:, :1]), dim=1)
        dist.all_reduce(sums, group=self._replicas)
        self._step = _Step(torch.cat((mine[None], extremes)), copies, sums)

    @torch.no_grad()
    def compare(self, step: int) -> None:
        """Compare what was seen in the latest step that was watched.

        Raises:
            TrainingError: on every rank, with parameters, ranks and step.
        """
        assert self._step is not None, "the step was not watched"
        seen, self._step = self._step, None
        self._engine.exchange.wait_for_device("while it compared replicas")
        findings = self._differing_weights(seen.hashes) + self._lost_gradients(seen.gradients)
        votes = torch.full((1 + 3 * len(self._copies),), -torch.inf, dtype=torch.float64)
        votes[0] = bool(findings)
        # Largest and negated smallest projection, and length, of every copied parameter.
        largest, smallest, length = votes[1:].view(3, -1)
        for number, key in enumerate(self._copies):
            if key in seen.copies:
                signed, square = seen.copies[key].tolist()
                largest[number], smallest[number], length[number] = signed, -signed, square**0.5
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._groups.control)
        allowed = length * COPY_TOLERANCES[next(iter(self._parameters.values())).element_size()]
        apart = largest + smallest > allowed
        if votes[0] or apart.any():
            raise shared(self._error(step, findings + self._differing_copies(seen.copies, apart, allowed)))

    def _holds(self, key: tuple[str, int]) -> bool:
        place = self._groups.place
        return self._groups.grid.rank(place.pipe, 0, place.tensor) in self._copies[key]

    def _differing_weights(self, hashes: Tensor) -> list[Difference]:
        mine, largest, inverted = hashes.cpu()
        differing = zip(self._parameters, mine.tolist(), (largest != ~inverted).tolist(), strict=True)
        return [Difference(WEIGHTS, name, self._replica_ranks(), value) for name, value, differs in differing if differs]

    def _lost_gradients(self, sums: Tensor) -> list[Difference]:
        """Gradients whose mean is not what the owners of their parts have received, on the owners."""
        before, squares, after = sums.cpu().unbind(1)
        # An infinite gradient makes the difference nan, which is not greater: that step is skipped anyway.
        wrong = ((after - before).abs() > GRADIENT_TOLERANCE * squares.sqrt()).tolist()
        lost = [item for item, is_wrong in zip(self._parameters.items(), wrong, strict=True) if is_wrong]
        return [
            Difference(GRADIENT, name, self._replica_ranks())
            for name, parameter in lost
            if owned_part(parameter) is not None
        ]

    def _differing_copies(
        self, copies: Mapping[tuple[str, int], Tensor], apart: Tensor, allowed: Tensor
    ) -> list[Difference]:
        """Copies that are too far apart; the first replica reports for all."""
        if self._groups.place.data:
            return []
        return [
            Difference(COPIES, key[0], tuple(ranks), round(copies[key][0].item() / allowed[number].item()))
            for number, (key, ranks) in enumerate(self._copies.items())
            if apart[number] and key in copies
        ]

    def _replica_ranks(self) -> tuple[int, ...]:
        grid, place = self._groups.grid, self._groups.place
        return tuple(grid.rank(place.pipe, data, place.tensor) for data in range(grid.data))

    def _error(self, step: int, findings: Sequence[Difference]) -> TrainingError:
        """The error of all ranks together."""
        everyone: list[tuple[str, Sequence[Difference]]] = [("", ())] * dist.get_world_size()
        dist.all_gather_object(everyone, (socket.gethostname(), findings), group=self._groups.control)
        held: dict[tuple[str, str, tuple[int, ...]], dict[int, int]] = defaultdict(dict)
        for rank, (_, found) in enumerate(everyone):
            for kind, name, ranks, value in found:
                held[kind, name, ranks][rank] = value
        hosts = [host for host, _ in everyone]
        said = [_described(kind, name, values, hosts) for (kind, name, _), values in held.items()]
        more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
        return TrainingError(
            f"step {step}: replicas of the model differ: {'; '.join(said[:NAMED])}{more}. Nothing was saved after this "
            "step. Start the same command again: the run resumes from its newest checkpoint. If it happens again on "
            "the same host, leave that host out, because its memory, processor or network is at fault"
        )


def _described(kind: str, name: str, values: Mapping[int, int], hosts: Sequence[str]) -> str:
    """One finding of all ranks; where most of them agree, the others are named."""
    (common, count), *others = Counter(values.values()).most_common()
    most = bool(others) and count > others[0][1]
    odd = [rank for rank, value in values.items() if not most or value != common]
    where = " and ".join(f"rank {rank} ({hosts[rank]})" for rank in odd)
    if kind == GRADIENT:
        return f"the gradient of {name} that {where} received is not the mean of all replicas"
    rest = [str(rank) for rank in values if rank not in odd]
    return f"{name} on {where} differs from rank {', '.join(rest)}" if rest else f"{name} differs between {where}"
