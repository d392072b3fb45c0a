"""The audit finds one bit, one lost gradient and one copy that differs; the parity runs show no false alarm."""

import socket
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stagdist.errors import TrainingError
from stagdist.parallel.grid import Grid
from stagdist.training.engine import audit
from stagdist.training.engine.audit import Audit, copies_in_replica, projection, weight_hash
from stagdist.training.engine.deepspeed_adapter import owned_gradient
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from tests.ranks import GUARD_S, run_ranks
from tests.training.parity_cases import SHARED_AND_TIED, Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

MATRIX = "sections.0.layers.0.mlp.up_proj.weight"
NORM = "sections.0.layers.0.mlp_norm.weight"


@dataclass(frozen=True)
class Planted:
    """What goes wrong on one rank in the second step.

    Attributes:
        how: `bit`, `gradient` or `value`.
        says: part of the error.
    """

    how: str
    parameter: str
    rank: int
    case: Case
    says: str

    @property
    def label(self) -> str:
        """Name of the test."""
        return f"{self.how} of {self.parameter}, {self.case.name}"


def grid(pipe: int, data: int, tensor: int, precision: str = "fp32", **model: object) -> Case:
    name = f"{precision} on {pipe}x{data}x{tensor}"
    return Case(name, model, (pipe, data, tensor), precision=precision, micro_batch_size=2)


PLANTED = [
    Planted("bit", MATRIX, 1, grid(2, 2, 1), f"{MATRIX} differs between rank 0 (HOST) and rank 1 (HOST)"),
    Planted("bit", MATRIX, 3, grid(1, 2, 2, "bf16"), f"{MATRIX} differs between rank 1 (HOST) and rank 3 (HOST)"),
    Planted("bit", NORM, 2, grid(1, 4, 1), f"{NORM} on rank 2 (HOST) differs from rank 0, 1, 3"),
    Planted("gradient", MATRIX, 1, grid(2, 2, 1), f"the gradient of {MATRIX} that rank 1 (HOST) received is not"),
    Planted("gradient", NORM, 0, grid(1, 2, 2, "bf16"), f"the gradient of {NORM} that rank 0 (HOST) received is not"),
    Planted("value", NORM, 1, grid(2, 1, 2), f"{NORM} differs between rank 0 (HOST) and rank 1 (HOST)"),
    Planted(
        "value", "embedding.weight", 2, grid(2, 1, 2, **SHARED_AND_TIED),
        "embedding.weight differs between rank 0 (HOST) and rank 2 (HOST)",
    ),
    Planted("nothing", MATRIX, 0, grid(2, 2, 1), ""),
]  # fmt: skip


def train_all(planted: list[Planted]) -> list[str]:
    """What the audit says about each, on one rank; empty if nothing."""
    world = World(GUARD_S)
    return [train(each, world) for each in sorted(planted, key=lambda each: each.case.grid)]


def train(planted: Planted, world: World) -> str:
    """Three steps, the second of which goes wrong."""
    case, groups = planted.case, world.groups(planted.case.grid)
    config = case.config()
    engine = build_engine(config, groups)
    watcher = Audit(engine, groups, config.model, every_steps=1)
    here = groups.grid.coordinate(planted.rank) == groups.place
    for step, (tokens, labels) in enumerate(case.batches(), start=1):
        batches = micro_batches(case, groups, tokens, labels)
        wrong = here and step == 2
        if wrong and planted.how in ("bit", "value"):
            damage(engine.module.canonical_parameters()[planted.parameter], planted.how)

        def watch(reduce: Callable[[], None], wrong: bool = wrong) -> None:
            losing = wrong and planted.how == "gradient"
            watcher.watch_reduction(lambda: lose(engine, planted.parameter, reduce) if losing else reduce())

        engine.train_batch(batches, None, watch)
        try:
            watcher.compare(step)
        except TrainingError as error:
            return str(error)
    return ""


def damage(parameter: Tensor, how: str) -> None:
    """Change one value: its lowest bit, or all of it."""
    with torch.no_grad():
        if how == "bit":
            bits = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
            parameter.data.view(-1)[1:2].view(bits).bitwise_xor_(1)
        else:
            parameter.data.view(-1)[1] += 1


def lose(engine: SectionEngine, name: str, reduce: Callable[[], None]) -> None:
    """Reduce all gradients but one, of which this rank keeps what it had."""
    parameter = engine.module.canonical_parameters()[name]
    found = engine.unreduced_gradient(parameter)
    assert found is not None
    kept = found.clone().flatten()
    reduce()
    part = owned_gradient(parameter)
    assert part is not None, f"{name} is owned by another rank"
    part.values.copy_(kept[part.start : part.start + part.values.numel()])


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """What every rank said, by the label of what was planted."""
    ranks = run_ranks(f"{__name__}:train_all", 4, PLANTED)
    ordered = sorted(PLANTED, key=lambda each: each.case.grid)
    return {each.label: [rank[number] for rank in ranks] for number, each in enumerate(ordered)}


@pytest.mark.ranks
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.label)
def test_what_was_planted_is_named_on_every_rank_with_its_step(said: dict[str, list[str]], planted: Planted) -> None:
    (text,) = set(said[planted.label])
    if planted.how == "nothing":
        assert text == ""
        return
    assert text.startswith("step 2: ") and planted.says.replace("HOST", socket.gethostname()) in text
    assert "Nothing was saved after this step" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_hash_changes_with_any_bit_and_any_exchange(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "CHUNK", 7)
    values = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[values.element_size()]
    seen = {int(weight_hash(values))}
    for position in (0, 6, 7, 26):
        for bit in range(8 * values.element_size()):
            other = values.clone()
            other.view(-1)[position : position + 1].view(bits).bitwise_xor_(1 << bit if bit < 15 else -(1 << bit))
            seen.add(int(weight_hash(other)))
        exchanged = values.clone()
        exchanged.view(-1)[[position, 13]] = values.view(-1)[[13, position]]
        seen.add(int(weight_hash(exchanged)))
    assert len(seen) == 1 + 4 * (8 * values.element_size() + 1)
    assert int(weight_hash(values.clone())) in seen
    assert int(weight_hash(torch.zeros(4))) != int(weight_hash(-torch.zeros(4))), "0 and -0 differ"


def test_projections_are_linear_and_those_of_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "CHUNK", 64)
    first, second = torch.randn(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    signed, square = projection((first + second) / 2)
    assert signed.item() == pytest.approx((projection(first)[0] + projection(second)[0]).item() / 2)
    assert square.item() == pytest.approx(((first + second) / 2).square().sum().item())
    parts = projection(first[:101]) + projection(first[101:], start=101)
    assert parts.tolist() == pytest.approx(projection(first).tolist())
    assert abs(projection(torch.ones(10_000))[0]) < 300, "signs are balanced"


def test_copies_are_those_of_tied_shared_and_replicated_parameters() -> None:
    model = grid(2, 1, 1, **SHARED_AND_TIED).config().model
    alone = copies_in_replica(model, Grid(2, 1, 1))
    assert (
        alone["embedding.weight", 0] == [0, 1] and alone[MATRIX, 0] == [0, 1] and ("output_norm.weight", 0) not in alone
    )
    split = copies_in_replica(model, Grid(2, 2, 2))
    assert split[MATRIX, 1] == [1, 5] and split[NORM, 0] == [0, 1, 4, 5] and split["output_norm.weight", 0] == [4, 5]
    combined = copies_in_replica(grid(2, 1, 1, combine_sections=True).config().model, Grid(2, 1, 2))
    assert combined["section_mix.0", 0] == [0, 1] and combined["section_mix.1", 0] == [2, 3]
    assert copies_in_replica(model, Grid(1, 4, 1)) == {}
