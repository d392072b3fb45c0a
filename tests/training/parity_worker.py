"""The ranks of a parity launch: train each case from the reference's parameters, and report."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from stagdist.errors import TrainingError
from stagdist.parallel.grid import Coordinate
from stagdist.parallel.groups import Groups
from stagdist.training.engine.audit import Audit
from stagdist.training.engine.pipeline import SectionPipeline
from stagdist.training.engine.section_engine import SectionEngine, build_module, wrap_module
from stagdist.training.engine_logits import engine_logits
from tests.ranks import GUARD_S
from tests.reference.sharding import cut
from tests.training.faults import damage, planted, replica
from tests.training.parity_cases import GLOBAL_BATCH, LEARNING_RATES, Case
from tests.training.worlds import World


@dataclass
class RankReport:
    """Results of one rank in a case.

    Attributes:
        place: coordinate of the rank.
        initial: initial values before the reference's replaced them, by canonical name.
        losses: of every step.
        norms: before clipping, of every step.
        gradients: of every step, averaged over replicas and before clipping, this rank's part.
        weights: after the last step.
        finite: argument of the gate at every step.
        differences: what an audit found, of every step.
        logits: of `case.text()` after the last step, on rank 0.
    """

    place: Coordinate
    initial: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    finite: list[bool] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def run_cases(cases: list[Case]) -> dict[str, RankReport]:
    """Run all cases one after the other in one world; reports by the case's name."""
    reports: dict[str, RankReport] = {}
    world = World(GUARD_S)
    for case in sorted(cases, key=lambda case: case.grid):
        groups = world.groups(case.grid)
        try:
            with planted(case.fault):
                reports[case.name] = _run(case, groups)
        except Exception as error:
            raise RuntimeError(f"case {case.name!r} failed: {error!r}") from error
    return reports


def _run(case: Case, groups: Groups) -> RankReport:
    config = case.config()
    module = build_module(config, groups)
    report = RankReport(groups.place, _values(module))
    load_reference(module, case, groups)
    engine = wrap_module(module, config, groups)
    damage(engine, case.fault)
    audit = Audit(engine, groups, config.model, every_steps=1)

    def gate(finite: bool) -> bool:
        report.finite.append(finite)
        _look(engine, report)
        bad = torch.tensor(int(not finite))
        dist.all_reduce(bad, group=groups.control)
        return not bad

    for rate, (tokens, labels) in zip(LEARNING_RATES, case.batches(), strict=True):
        engine.set_learning_rate(rate)
        loss = engine.train_batch(micro_batches(case, groups, tokens, labels), gate, audit.watch_reduction)
        report.losses.append(float(loss))
        report.norms.append(engine.gradient_norm())
        try:
            audit.compare(len(report.losses))
        except TrainingError as error:
            report.differences.append(str(error))
    report.weights = _values(module)
    report.logits = engine_logits(engine, groups, config.model.vocab_size, case.text())
    return report


def load_reference(module: SectionPipeline, case: Case, groups: Groups) -> None:
    """The reference's parameters in place of the initial ones."""
    parameters = case.parameters()
    with torch.no_grad():
        for name, parameter in module.canonical_parameters().items():
            parameter.copy_(cut(parameters, name, groups.place.tensor, groups.grid.tensor))


def _look(engine: SectionEngine, report: RankReport) -> None:
    """Record the gradients. The gate is called when every reduction is done and nothing is clipped yet."""
    gradients = {}
    for name, parameter in engine.module.canonical_parameters().items():
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, f"{name} has no gradient"
        gradients[name] = gradient.detach().to("cpu", copy=True)
    report.gradients.append(gradients)


def micro_batches(case: Case, groups: Groups, tokens: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The replica's share of a global batch, micro-batches dealt round robin."""
    size, replicas = case.micro_batch_size, groups.grid.data
    for start in range(replica(groups.place, case.fault) * size, GLOBAL_BATCH, replicas * size):
        yield tokens[start : start + size], labels[start : start + size]


def _values(module: SectionPipeline) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in module.canonical_parameters().items()
    }
