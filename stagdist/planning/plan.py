"""Plan a run: grid, parameters, memory and FLOPs, and every reason why it would not start. Pure, no torch.

No processes, devices or corpora are needed. `stagdist/planning/dry_run.py` prints a plan.
"""

from dataclasses import dataclass
from math import prod

from stagdist.config.run_config import RunConfig
from stagdist.parallel.grid import Grid, grid_for
from stagdist.parallel.layout import (
    model_parameters,
    padded_vocab_size,
    section_parameters,
    stage_layout,
    stage_parameters,
)
from stagdist.planning.flops import SectionFlops, section_flops
from stagdist.planning.memory import Device, StageMemory, stage_memory

IMBALANCE = 1.1
"""FLOPs of the slowest stage relative to the mean from which a warning is given."""


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage.

    Attributes:
        sections: indices of its sections.
        parameters: values on all tensor ranks of the stage, with copies, without padding of the vocabulary.
        copies: how many of them an earlier stage holds too (tied embedding, shared weights).
        parameters_per_rank: values on one of its ranks, with padding.
        flops: training FLOPs per token.
        memory: bytes on one of its ranks; None if the world size does not fit.
    """

    sections: range
    parameters: int
    copies: int
    parameters_per_rank: int
    flops: float
    memory: StageMemory | None


@dataclass(frozen=True)
class Plan:
    """The plan of a run on a number of ranks.

    Attributes:
        device: kind of device for which memory is estimated.
        grid: layout of the ranks; None if they do not fit.
        parameters: values of the model, each counted once.
        section_parameters: values of every section; shared weights are counted in the first one.
        section_flops: training FLOPs per token of every section.
        stages: the pipeline stages; empty if the sections cannot be divided among them.
        micro_batches: micro-batches per replica and optimizer step; None if the ranks do not fit.
        problems: every reason why the run would not start.
        warnings: settings that work but are probably not intended.
    """

    config: RunConfig
    world_size: int
    device: Device
    grid: Grid | None
    parameters: int
    section_parameters: tuple[int, ...]
    section_flops: tuple[SectionFlops, ...]
    stages: tuple[StagePlan, ...]
    micro_batches: int | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all replicas."""
        return self.config.training.global_batch_size * self.config.sequence_length

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token of the complete model."""
        return sum(section.total for section in self.section_flops)

    @property
    def speedup_bound(self) -> float | None:
        """Upper bound of the speed-up over one device, if time is proportional to FLOPs and messages take none."""
        if self.micro_batches is None or not self.stages:
            return None
        times = [stage.flops for stage in self.stages]
        return self.micro_batches * sum(times) / ((self.micro_batches - 1) * max(times) + sum(times))

    @property
    def bubble_bound(self) -> float | None:
        """Lower bound of the idle share of the stages' time, from filling, draining and imbalance."""
        bound = self.speedup_bound
        return None if bound is None else 1 - bound / len(self.stages)


def plan(config: RunConfig, world_size: int, device: Device = "cpu", problems: tuple[str, ...] = ()) -> Plan:
    """Plan a run.

    Args:
        config: may be inconsistent if `problems` says why.
        device: kind of device to assume if `parallel.device` is auto.
        problems: problems of the configuration that were found before.
    """
    chosen = config.parallel.device
    on: Device = device if chosen == "auto" else "cuda" if chosen.startswith("cuda") else "cpu"
    divides = config.model.num_sections % config.pipeline_parallel_size == 0
    found = list(problems) + (config.world_problems(world_size) if divides else [])
    if not (config.data.corpora or config.data.train_corpora):
        found.append("data.corpora is empty; prepare a corpus with tools/prepare_data.py and set data.corpora.0.prefix")
    grid = grid_for(config, world_size) if divides and not config.world_problems(world_size) else None
    splits = grid is not None and not problems
    stages = _stages(config, grid if splits else None, on) if divides else ()
    return Plan(
        config=config,
        world_size=world_size,
        device=on,
        grid=grid,
        parameters=sum(spec.numel for spec in model_parameters(config.model)),
        section_parameters=tuple(
            sum(spec.numel for spec in section_parameters(config.model, section))
            for section in range(config.model.num_sections)
        ),
        section_flops=tuple(section_flops(config.model, config.sequence_length)),
        stages=stages,
        micro_batches=None if grid is None else config.training.num_micro_batches(grid.data),
        problems=tuple(found),
        warnings=tuple(_warnings(config, grid, stages)),
    )


def _stages(config: RunConfig, grid: Grid | None, device: Device) -> tuple[StagePlan, ...]:
    """All stages; without a grid, tensor parallelism and memory are not considered."""
    model, pipe = config.model, config.pipeline_parallel_size
    flops = section_flops(model, config.sequence_length)
    seen: set[str] = set()
    stages = []
    for stage in range(pipe):
        specs = {spec.name: spec for spec in stage_parameters(model, pipe, stage)}
        sections = stage_layout(model, pipe, stage).sections
        stages.append(
            StagePlan(
                sections=sections,
                parameters=sum(spec.numel for spec in specs.values()),
                copies=sum(spec.numel for name, spec in specs.items() if name in seen),
                parameters_per_rank=sum(prod(spec.local_shape(grid.tensor if grid else 1)) for spec in specs.values()),
                flops=sum(flops[section].total for section in sections),
                memory=stage_memory(config, grid, stage, device) if grid else None,
            )
        )
        seen |= set(specs) - {"section_mix"}  # each stage holds only the values of its own sections
    return tuple(stages)


def _warnings(config: RunConfig, grid: Grid | None, stages: tuple[StagePlan, ...]) -> list[str]:
    warnings = []
    if grid is not None and (count := config.training.num_micro_batches(grid.data)) < grid.pipe:
        warnings.append(
            f"{count} micro-batch{'es' if count > 1 else ''} cannot keep {grid.pipe} stages busy; raise "
            "training.global_batch_size or lower training.micro_batch_size"
        )
    if stages and max(stage.flops for stage in stages) * len(stages) > IMBALANCE * sum(s.flops for s in stages):
        shares = ", ".join(f"{stage.flops * len(stages) / sum(s.flops for s in stages):.2f}" for stage in stages)
        warnings.append(f"stages are unequal: FLOPs relative to the mean are {shares}; change model.section_layers")
    model, tensor = config.model, config.parallel.tensor_parallel_size
    if padded_vocab_size(model.vocab_size, tensor) != model.vocab_size:
        warnings.append(
            f"model.vocab_size {model.vocab_size} is padded to {padded_vocab_size(model.vocab_size, tensor)} for "
            f"parallel.tensor_parallel_size {tensor}"
        )
    if model.staggered and model.num_sections > 1 and model.stagger == 0:
        warnings.append("model.stagger is 0: a control experiment whose sections cannot decode in parallel")
    held_out = config.data.validation_corpora or (config.data.corpora and config.data.split[1] > 0)
    if config.evaluation.interval_steps and not held_out:
        warnings.append("evaluation.interval_steps is set, but no corpus has a validation share")
    return warnings
