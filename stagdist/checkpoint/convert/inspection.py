"""Report the content of a directory, complete or damaged, as text or JSON."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.complete import COMPLETE, damage, read_complete
from stagdist.checkpoint.convert.find import FoundCheckpoint, find, open_training, source_tokenizer
from stagdist.checkpoint.published.model_json import read_body
from stagdist.checkpoint.published.model_reader import ChangedTokenizerError, ModelReader
from stagdist.checkpoint.published.model_writer import CODE_FILES, weight_map
from stagdist.checkpoint.published.record import CHECKSUMS, read_record
from stagdist.checkpoint.text_tokens import GENERATION
from stagdist.checkpoint.training.directory import CONFIG, STATE
from stagdist.checkpoint.training.stage_files import tensor_files
from stagdist.checkpoint.training.training_reader import TrainingReader
from stagdist.checkpoint.weight_source import Track, WeightSource, untracked
from stagdist.data.tokenizer_files import holds_tokenizer
from stagdist.errors import CheckpointError, StagdistError
from stagdist.parallel.layout import model_parameters

_MODEL_FILES = ("config.json", GENERATION, "tokenizer.json", "tokenizer_config.json", CHECKSUMS)
_OUR_KEYS = ("connection", "section_layers")
"""Keys that only stagdist writes to the `config.json` of a Llama."""
_KINDS = {"training": "training checkpoint", "model": "model directory"}
_KNOWN_ENDINGS = (".safetensors", ".py", ".json", ".jinja", ".md", ".model", ".txt")


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
    tensors: list[TensorFacts] = field(default_factory=list)


def inspect(path: str | Path, *, trust_pickle: bool = False, track: Track[Any] = untracked) -> Inspection:
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
    source = (
        _open_checkpoint(found, report, trust_pickle) if found.kind == "training" else _open_directory(found, report)
    )
    if source is not None:
        _describe(source, report, track)
    return report


def _open_checkpoint(found: FoundCheckpoint, report: Inspection, trust_pickle: bool) -> WeightSource | None:
    """Open the checkpoint; None if it cannot be read."""
    try:
        reader = TrainingReader(found.directory, trust_pickle=trust_pickle)
    except StagdistError as error:
        report.problems.append(str(error))
        return None
    report.step, report.state = reader.state.step, asdict(reader.state)
    report.grid = dict(zip(("pipe", "data", "tensor"), reader.state.grid, strict=True))
    expected = {*tensor_files(reader.model, reader.state.grid, bf16=reader.bf16), CONFIG, STATE, COMPLETE}
    report.problems += [f"{name} is missing" for name in sorted(expected - set(report.files))]
    report.problems += [f"{name} does not belong here" for name in sorted(set(report.files) - expected)]
    if (found.directory / COMPLETE).is_file():
        try:
            records = read_complete(found.directory)
            reason = damage(found.directory, sorted(records), records)
            report.problems += [reason] if reason is not None and reason not in report.problems else []
            with suppress(CheckpointError):  # the tokenizer may be on another machine
                source_tokenizer(reader, None)
            if not report.problems:
                return open_training(found.directory, trust_pickle=trust_pickle)
        except StagdistError as error:
            report.problems.append(str(error))
    return None if report.problems else reader


def _open_directory(found: FoundCheckpoint, report: Inspection) -> WeightSource | None:
    report.problems += [f"{name} is missing" for name in _expected(found.directory) if name not in report.files]
    try:
        used = {file for _, file in weight_map(found.directory)}
        for name in report.files:
            odd = name.endswith(".safetensors") and name not in used
            if odd or not name.endswith((*_KNOWN_ENDINGS, "LICENSE", "NOTICE")):
                report.problems.append(f"{name} does not belong here")
        source = ModelReader(found.directory)
        report.problems += [problem for problem in source.record.changed_files() if problem not in report.problems]
        source.check()
    except StagdistError as error:
        report.problems.append(str(error))
        return None
    if holds_tokenizer(found.directory):
        try:
            source_tokenizer(source, None)
        except StagdistError as error:
            report.problems += [] if isinstance(error, ChangedTokenizerError) else [str(error)]  # is in the list
    return source


def _expected(directory: Path) -> tuple[str, ...]:
    """Required files beside the weights: all files of a directory of ours, only `config.json` of another one.

    A directory from an earlier release is complete with the code files that its record lists.
    """
    body: dict[str, Any] = {}
    with suppress(StagdistError):  # reported when the directory is opened
        body = read_body(directory)
    staggered = body.get("model_type") == "stagformer"
    if not staggered and not (directory / CHECKSUMS).is_file() and not any(key in body for key in _OUR_KEYS):
        return _MODEL_FILES[:1]
    recorded: dict[str, str] = {}
    with suppress(StagdistError):
        recorded = read_record(directory).files
    code = [name for name in CODE_FILES if name in recorded] or CODE_FILES
    return (*_MODEL_FILES, *code) if staggered else _MODEL_FILES


def _describe(source: WeightSource, report: Inspection, track: Track[Any]) -> None:
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
    values = tensor.float()
    std, mean = torch.std_mean(values, correction=0)
    low, high = torch.aminmax(values)
    return TensorFacts(
        name=name,
        shape=list(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        mean=float(mean),
        std=float(std),
        min=float(low),
        max=float(high),
        finite=bool(torch.isfinite(values).all()),
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
        width = max(len(facts.name) for facts in report.tensors)
        lines.append(f"\n{'tensor':{width}}  {'shape':>16} {'mean':>10} {'std':>10} {'min':>10} {'max':>10}")
        for one in report.tensors:
            shape = "x".join(map(str, one.shape))
            numbers = " ".join(f"{value:10.3g}" for value in (one.mean, one.std, one.min, one.max))
            lines.append(f"{one.name:{width}}  {shape:>16} {numbers}")
    lines += ["", *([f"PROBLEM: {problem}" for problem in report.problems] or ["no problem found"])]
    return "\n".join(lines)
