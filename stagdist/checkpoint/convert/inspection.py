"""Report the content of a directory, complete or damaged, as text or JSON."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.complete import COMPLETE, read_complete
from stagdist.checkpoint.convert.find import FoundCheckpoint, find, open_weights, source_tokenizer
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.checkpoint.weight_source import Track, WeightSource, untracked
from stagdist.data.tokenizer_files import holds_tokenizer
from stagdist.errors import CheckpointError, StagdistError
from stagdist.parallel.layout import model_parameters

_EARLIER = "checksums.json"
"""What earlier releases wrote in place of `complete.json`."""
_KINDS = {"training": "training checkpoint", "model": "model directory"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5")
"""Endings of files with weights, which another program could read in place of those of the directory."""


@dataclass(frozen=True)
class TensorFacts:
    """Statistics over all values of one tensor."""

    name: str
    shape: list[int]
    dtype: str
    mean: float
    std: float
    min: float
    max: float
    finite: bool


@dataclass
class Inspection:
    """The content of a directory.

    Attributes:
        kind: `training checkpoint` or `model directory`.
        problems: everything that is missing, unknown or wrong; empty for an intact directory.
        notes: what could not be checked.
        bytes: size of all files.
    """

    kind: str
    directory: str
    step: int | None = None
    grid: dict[str, int] | None = None
    dtype: str | None = None
    parameters: int = 0
    bytes: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: list[TensorFacts] = field(default_factory=list)


def inspect(path: str | Path, *, track: Track[Any] = untracked) -> Inspection:
    """Examine a directory. Problems are listed, not raised.

    Raises:
        CheckpointError: this is neither a checkpoint nor a model directory.
    """
    found = find(path)
    report = Inspection(_KINDS[found.kind], str(found.directory))
    files = {file.relative_to(found.directory): file for file in sorted(found.directory.rglob("*")) if file.is_file()}
    # Hidden files belong to other programs: a hub, version control, a file manager.
    hidden = [name for name in files if any(part.startswith(".") for part in name.parts)]
    report.files = {name.as_posix(): file.stat().st_size for name, file in files.items() if name not in hidden}
    report.bytes = sum(report.files.values())
    try:
        _compare_names(found, report)
        if not report.problems:
            source = open_weights(found.directory)
            _describe(source, report, track)
            source.check()
            if isinstance(source, ModelReader):
                report.problems += [
                    f"{name} does not belong here"
                    for name in report.files
                    if name.endswith(_WEIGHTS) and name not in source.weight_files
                ]
    except StagdistError as error:
        report.problems.append(str(error))
    return report


def _compare_names(found: FoundCheckpoint, report: Inspection) -> None:
    """Compare the names of the files with the records. A model directory may hold more than was written."""
    if COMPLETE not in report.files and found.kind == "model":
        old = f"; {_EARLIER} of an earlier release is not read" if _EARLIER in report.files else ""
        report.notes.append(f"there is no {COMPLETE}: changes after the directory was written are not detected{old}")
        return
    recorded = read_complete(found.directory).keys() | {COMPLETE}
    report.problems += [f"{name} is missing" for name in sorted(recorded - report.files.keys())]
    if found.kind == "training":
        report.problems += [f"{name} does not belong here" for name in sorted(report.files.keys() - recorded)]


def _describe(source: WeightSource, report: Inspection, track: Track[Any]) -> None:
    if isinstance(source, TrainingReader):
        report.step, report.state = source.state.step, asdict(source.state)
        del report.state["generators"]  # states of random generators, which say nothing to a reader
        report.grid = dict(zip(("pipe", "data", "tensor"), source.state.grid, strict=True))
        with suppress(CheckpointError):  # the tokenizer may be on another machine
            source_tokenizer(source, None)
    elif holds_tokenizer(source.directory):
        source_tokenizer(source, None)
    report.model, report.dtype = source.model.model_dump(mode="json"), str(source.dtype).removeprefix("torch.")
    specs = model_parameters(source.model)
    report.parameters = sum(spec.numel for spec in specs)
    for spec in track(specs, "reading"):
        facts = tensor_facts(spec.name, source.weight(spec))
        report.tensors.append(facts)
        if not facts.finite:
            report.problems.append(f"{spec.name} has values that are not finite")


def tensor_facts(name: str, tensor: Tensor) -> TensorFacts:
    """Compute the statistics of one tensor."""
    std, mean = torch.std_mean(tensor.float(), correction=0)
    low, high = torch.aminmax(tensor)
    return TensorFacts(
        name=name,
        shape=list(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        mean=float(mean),
        std=float(std),
        min=float(low),
        max=float(high),
        finite=bool(torch.isfinite(low) and torch.isfinite(high)),
    )


def as_table(report: Inspection) -> str:
    """The report as text."""
    lines = [f"{report.kind} {report.directory}, {report.bytes / 1e6:.1f} MB in {len(report.files)} files"]
    if report.step is not None and report.grid is not None:
        sizes = " x ".join(f"{axis} {size}" for axis, size in report.grid.items())
        lines.append(f"step {report.step}, {report.state['consumed_samples']} samples seen, grid {sizes}")
    if report.model:
        keys = ("connection", "section_layers", "hidden_size", "vocab_size", "share_section_weights")
        lines.append(", ".join(f"{key} {report.model[key]}" for key in keys))
        lines.append(f"{report.parameters:,} parameters, {report.dtype}")
        width = max((len(facts.name) for facts in report.tensors), default=6)
        lines.append(f"\n{'tensor':{width}}  {'shape':>16} {'mean':>10} {'std':>10} {'min':>10} {'max':>10}")
        for one in report.tensors:
            shape = "x".join(map(str, one.shape))
            numbers = " ".join(f"{value:10.3g}" for value in (one.mean, one.std, one.min, one.max))
            lines.append(f"{one.name:{width}}  {shape:>16} {numbers}")
    lines += ["", *[f"note: {note}" for note in report.notes]]
    lines += [*([f"PROBLEM: {problem}" for problem in report.problems] or ["no problem found"])]
    return "\n".join(lines)
