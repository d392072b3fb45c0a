"""The dry run: print the plan of a run, without processes or devices."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from stagdist.config.loading import dump_config, read_config
from stagdist.config.parts import CorpusConfig
from stagdist.config.run_config import RunConfig
from stagdist.planning.memory import Device, StageMemory
from stagdist.planning.plan import Plan, plan

RUNS, REFUSED = 0, 2
"""Exit codes: the run would start, or it would not."""


def dry_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    device: Device = "cpu",
    data_problems: Callable[[RunConfig], Sequence[str]] = lambda config: (),
) -> tuple[str, int]:
    """The output of `--dry-run`, and its exit code: 0 if the run would start, 2 if it would not.

    Args:
        world_size: number of ranks; None for the smallest number that fits the configuration.
        device: kind of device to assume if `parallel.device` is auto.
        data_problems: why the tokenizer and the corpora that are on this machine cannot train the model.

    Raises:
        ConfigError: the file or an override cannot be read.
    """
    config, problems = read_config(path, overrides)
    if config is None:
        return _verdict(problems), REFUSED
    fewest = config.pipeline_parallel_size * config.parallel.tensor_parallel_size
    found = (*problems, *data_problems(config))
    planned = plan(config, fewest if world_size is None else world_size, device, found)
    return render(planned), REFUSED if planned.problems else RUNS


def render(planned: Plan) -> str:
    """A plan as text: configuration, grid, parameters, memory, work, verdict."""
    parts = [
        _heading("configuration") + dump_config(planned.config),
        _heading("grid") + _grid(planned),
        _heading("parameters") + _sections(planned) + "\n" + _stages(planned),
        _heading("memory per rank") + _memory(planned),
        _heading("work") + _work(planned),
    ]
    notes = [f"note: {note}\n" for note in _files(planned.config)]
    warnings = [f"warning: {warning}\n" for warning in planned.warnings]
    return "\n".join(parts) + "\n" + "".join(notes + warnings) + _verdict(planned.problems)


def _verdict(problems: Sequence[str]) -> str:
    if not problems:
        return "This run would start.\n"
    count = f"{len(problems)} reasons" if len(problems) > 1 else "one reason"
    return f"This run would not start, for {count}:\n" + "".join(f"  - {problem}\n" for problem in problems)


def _grid(planned: Plan) -> str:
    grid, ranks = planned.grid, planned.world_size
    if grid is None:
        return f"{ranks} ranks do not fit\n"
    return f"{ranks} ranks = {grid} (rank = (pipe * {grid.data} + data) * {grid.tensor} + tensor)\n"


def _sections(planned: Plan) -> str:
    model = planned.config.model
    rows = []
    for index, (layers, parameters) in enumerate(zip(model.section_layers, planned.section_parameters, strict=True)):
        shared = "  plus the weights shared with section 1" if model.share_section_weights and index else ""
        rows.append([f"section {index + 1}", f"{layers} layers", f"{parameters:,}{shared}"])
    rest = planned.parameters - sum(planned.section_parameters)
    tied = "embedding (tied to the head), final norm" if model.tie_word_embeddings else "embedding, head, final norm"
    rows.append([tied + (", mix" if model.combine_sections else ""), "", f"{rest:,}"])
    rows.append(["model", f"{model.num_layers} layers", f"{planned.parameters:,}"])
    return _table(rows)


def _stages(planned: Plan) -> str:
    if not planned.stages:
        return "the sections cannot be divided among the stages\n"
    rows = [["stage", "sections", "parameters", "of these copies", "per rank"]]
    for index, stage in enumerate(planned.stages):
        names = "-".join(sorted({str(stage.sections.start + 1), str(stage.sections.stop)}, key=int))
        counts = [f"{stage.parameters:,}", f"{stage.copies:,}", f"{stage.parameters_per_rank:,}"]
        rows.append([f"{index}", names, *counts])
    return _table(rows) + "Copies are tied or shared tensors that an earlier stage also holds.\n"


def _memory(planned: Plan) -> str:
    header = ["stage", "weights", "gradients", "optimizer", "activations", "buffers", "peak", "reached in"]
    rows = [header]
    for index, stage in enumerate(planned.stages):
        if stage.memory is not None:
            rows.append([f"{index}", *_memory_cells(stage.memory)])
    if len(rows) == 1:
        return "unknown until the ranks fit\n"
    auto = " (parallel.device is auto)" if planned.config.parallel.device == "auto" else ""
    return _table(rows) + (
        f"Peak bytes of tensors, estimated for {planned.device}{auto}. Activations: most bytes held at once during a\n"
        "backward pass. Buffers: temporary tensors at the moment of the peak, minus tensors freed by then.\n"
    )


def _memory_cells(memory: StageMemory) -> list[str]:
    activations = memory.activations if memory.peak_moment == "backward pass" else 0
    buffers = memory.total - memory.weights - memory.gradients - memory.optimizer - activations
    shown = (memory.weights, memory.gradients, memory.optimizer, memory.activations, buffers, memory.total)
    return [*(_size(size) for size in shown), memory.peak_moment]


def _work(planned: Plan) -> str:
    training, step = planned.config.training, planned.tokens_per_step
    rows = [
        ["tokens per step", f"{step:,}"],
        ["tokens of the run", f"{step * training.steps:,}"],
        ["training FLOPs per token", f"{planned.flops_per_token:.4g}"],
        ["training FLOPs per step", f"{planned.flops_per_token * step:.4g}"],
    ]
    for index, parts in enumerate(planned.section_flops):
        shares = {"projections": parts.projections, "attention": parts.attention}
        shares |= {"cross-attention": parts.cross_attention, "head": parts.head}
        named = ", ".join(f"{name} {share / parts.total:.1%}" for name, share in shares.items() if share)
        rows.append([f"  section {index + 1}", f"{parts.total:.4g} ({named})"])
    if planned.micro_batches is not None:
        rows.append(["micro-batches per step and replica", f"{planned.micro_batches}"])
    if planned.bubble_bound is not None and planned.speedup_bound is not None:
        stages = len(planned.stages)
        bound = f"{planned.bubble_bound:.1%} (speed-up at most {planned.speedup_bound:.2f} of {stages} stages)"
        rows.append(["pipeline bubble at least", bound])
    return _table(rows)


def _files(config: RunConfig) -> list[str]:
    """Files of the run that do not exist on this machine; they may exist on the hosts of the run."""
    data = config.data
    corpora: tuple[CorpusConfig, ...] = data.corpora + data.train_corpora + data.validation_corpora + data.test_corpora
    needed = [f"{corpus.prefix}{ending}" for corpus in corpora for ending in (".bin", ".idx")]
    if data.tokenizer != "bytes":
        needed.append(data.tokenizer)
    return [f"{path} is not on this machine" for path in dict.fromkeys(needed) if not os.path.exists(path)]


def _heading(title: str) -> str:
    return f"{title}\n{'-' * len(title)}\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _size(size: int) -> str:
    """Bytes in a readable unit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"
