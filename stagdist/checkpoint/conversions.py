"""The conversions: each writes under a hidden name, proves the result, and only then gives it its name.

What fails or is killed leaves nothing that looks whole.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.imported import ImportedModel
from stagdist.checkpoint.model_directory import ModelDirectoryWriter
from stagdist.checkpoint.proof import largest_difference, text_ids
from stagdist.checkpoint.sources import (
    STEP_FOLDER,
    ModelSource,
    WeightSource,
    find,
    open_model,
    open_training,
    open_weights,
    source_tokenizer,
)
from stagdist.checkpoint.training_directory import (
    COMPLETE,
    CONFIG,
    TrainingState,
    checkpoint_files,
    checkpoint_name,
    file_record,
    publish,
    write_complete,
)
from stagdist.checkpoint.training_reader import TrainingReader
from stagdist.checkpoint.training_source import KINDS, Track, TrainingSource, untracked
from stagdist.checkpoint.training_writer import TrainingWriter
from stagdist.config import ModelConfig, RunConfig, require_world
from stagdist.config_loading import differences, dump_config, load_config, validate
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError, ConfigError
from stagdist.parallel.grid import Grid
from stagdist.parallel.layout import ParameterSpec, model_parameters


@dataclass(frozen=True)
class Options:
    """What conversions may be told.

    Attributes:
        tokenizer: where the tokenizer is, when the source does not say it.
        trust_pickle: see `load_file`.
        overwrite: replace what exists.
        files_checked: the files of a training checkpoint were just compared with their records.
        track: shows progress.
    """

    tokenizer: str | None = None
    trust_pickle: bool = False
    overwrite: bool = False
    files_checked: bool = False
    track: Track[Any] = untracked


@dataclass(frozen=True)
class Proof:
    """What a conversion has shown.

    Attributes:
        directory: what it wrote.
        checked: what was compared, for a person.
    """

    directory: Path
    checked: str


def export(source: str | Path, destination: str | Path, options: Options) -> Proof:
    """Training checkpoint (any grid) to model directory.

    Raises:
        CheckpointError: source or destination will not do, or the proof failed; nothing is left behind.
    """
    reader = open_training(source, trust_pickle=options.trust_pickle)
    return _write_model(reader, reader.model, reader.weight, Path(destination), options)


def split(source: str | Path, destination: str | Path, options: Options) -> Proof:
    """Shared weights to separate sections: every section gets a copy of its own.

    Raises:
        CheckpointError: the sections of the source share nothing; else as `export`.
    """
    weights = open_weights(source, trust_pickle=options.trust_pickle)
    if not weights.model.share_section_weights:
        raise CheckpointError(f"{weights.directory}: its sections share no weights, there is nothing to split")
    model = ModelConfig.model_validate(weights.model.model_dump() | {"share_section_weights": False})
    shared = {spec.name: spec for spec in model_parameters(weights.model)}

    def weight(spec: ParameterSpec) -> Tensor:
        if spec.name in shared:
            return weights.weight(shared[spec.name])
        _, _, rest = spec.name.split(".", 2)
        return weights.weight(shared[f"sections.0.{rest}"])

    return _write_model(weights, model, weight, Path(destination), options)


def merge(sources: Sequence[str | Path], destination: str | Path, options: Options) -> Proof:
    """The average of several checkpoints or model directories of one model, as a model directory.

    Raises:
        CheckpointError: the models differ, by key; else as `export`.
    """
    opened = [open_weights(source, trust_pickle=options.trust_pickle) for source in sources]
    for other in opened[1:]:
        changed = differences(opened[0].model, other.model)
        if changed:
            raise CheckpointError(
                f"{other.directory} is another model than {opened[0].directory}: "
                + ", ".join(f"{key} {old!r} and {new!r}" for key, (old, new) in changed.items())
            )

    def average(spec: ParameterSpec) -> Tensor:
        total = torch.zeros(spec.shape)
        for one in opened:
            total += one.weight(spec).float()
        return (total / len(opened)).to(opened[0].dtype)

    return _write_model(opened[0], opened[0].model, average, Path(destination), options, keeps_function=False)


def reshard(
    source: str | Path, destination: str | Path, grid: Grid, options: Options, *, config: RunConfig | None = None
) -> Proof:
    """Training checkpoint to another grid, with optimizer, counters, position in the data and generators.

    Args:
        destination: a run's folder, or a `step_NNNNNNNN` inside its `checkpoints`.
        config: of the run that goes on; that of the checkpoint unless given.

    Raises:
        CheckpointError: source or destination will not do, or the proof failed; nothing is left behind.
        ConfigError: the batch or the model does not fit the grid.
    """
    reader = open_training(source, trust_pickle=options.trust_pickle, files_checked=options.files_checked)
    config = on_grid(reader.config if config is None else config, grid)
    state = replace(reader.state, grid=(grid.pipe, grid.data, grid.tensor))
    final = training_destination(Path(destination), state.step)
    _write_training(reader, config, state, final, options)
    tensors = len(list(reader.specs())) * (1 + len(KINDS))
    return Proof(final, f"{tensors} tensors, optimizer's included, are bit-equal on all {grid.world_size} ranks")


def import_model(
    source: str | Path, destination: str | Path, grid: Grid, config_file: str | None, options: Options
) -> Proof:
    """Model directory to a training checkpoint at step 0 that `pretrain` begins from.

    Args:
        config_file: configuration of the run to come; its precision and optimizer are used.

    Raises:
        CheckpointError, ConfigError: as `reshard`; the configuration is of another model, by key.
    """
    weights = open_model(source)
    config = _import_config(weights, Path(destination), grid, config_file, options)
    state = TrainingState(0, 0, 0, (grid.pipe, grid.data, grid.tensor))
    final = training_destination(Path(destination), 0)
    _write_training(ImportedModel(weights, config), config, state, final, options)
    return Proof(final, f"{len(model_parameters(weights.model))} tensors are bit-equal")


def on_grid(config: RunConfig, grid: Grid) -> RunConfig:
    """The same run on another grid.

    Raises:
        ConfigError: model or batch does not fit it.
    """
    keys = config.model_dump(mode="json")
    keys["parallel"] |= {"pipeline_parallel_size": grid.pipe, "tensor_parallel_size": grid.tensor}
    moved, problems = validate(keys)
    if moved is None or problems:
        raise ConfigError(f"the run does not fit {grid}: {'; '.join(problems)}")
    require_world(moved, grid.world_size)
    return moved


def training_destination(destination: Path, step: int) -> Path:
    """Where a training checkpoint goes: a folder named like one, else the `checkpoints` of a run's folder.

    Raises:
        CheckpointError: it is named like another step.
    """
    match = STEP_FOLDER.fullmatch(destination.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{destination} is named like step {int(match[1])}, the checkpoint is of step {step}")
    return destination if match else destination / "checkpoints" / checkpoint_name(step)


def _import_config(
    weights: ModelSource, destination: Path, grid: Grid, config_file: str | None, options: Options
) -> RunConfig:
    precisions = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if config_file is not None:
        config = load_config(config_file)
        changed = differences(config.model, weights.model)
        if changed:
            listed = ", ".join(
                f"model.{key} is {old!r}, the directory has {new!r}" for key, (old, new) in changed.items()
            )
            raise ConfigError(f"{config_file} describes another model than {weights.directory}: {listed}")
        if config.training.precision == "fp16":
            raise ConfigError(f"{config_file}: training.precision is fp16; import for fp32 or bf16")
        return on_grid(config, grid)
    if weights.dtype not in precisions:
        raise CheckpointError(f"{weights.directory} is {weights.dtype}; give --config with the precision to train in")
    name = destination.parent.parent.name if STEP_FOLDER.fullmatch(destination.name) else destination.name
    keys = {
        "name": name or "imported",
        "model": weights.model.model_dump(mode="json"),
        "data": {"tokenizer": options.tokenizer or str(weights.directory.resolve())},
        "training": {"steps": 1, "global_batch_size": grid.data, "precision": precisions[weights.dtype]},
    }
    made, problems = validate(keys)
    if made is None or problems:
        raise ConfigError(f"{weights.directory}: {'; '.join(problems)}")
    return on_grid(made, grid)


def _write_training(
    source: TrainingSource, config: RunConfig, state: TrainingState, final: Path, options: Options
) -> None:
    """Write, read back, compare, publish."""
    _require_free(final, options)
    with _staged(final) as staged:
        (staged / CONFIG).write_text(dump_config(config))
        state.write(staged)
        grid = Grid(*state.grid)
        TrainingWriter(source, config, grid, staged).write(options.track)
        _prove_training(source, staged, options)
        names = checkpoint_files(staged)
        write_complete(staged, {name: file_record(staged / name, sync=True) for name in names})
        if final.exists():  # it loses its marker first: a removal that is cut short must not look whole
            (final / COMPLETE).unlink(missing_ok=True)
        publish(staged, final)


def _prove_training(source: TrainingSource, staged: Path, options: Options) -> None:
    """Every value of every rank, copies included, against where it came from."""
    written = TrainingReader(staged)
    written.check_layout()
    for spec in options.track(list(written.specs()), "checking"):
        if not torch.equal(written.weight(spec), source.weight(spec)):
            raise CheckpointError(f"{spec.name} was not written as it was read")
        for kind in KINDS:
            expected = source.optimizer_value(spec, kind)
            for place in written.places[spec.name]:
                if not torch.equal(written.optimizer_value(spec, kind, place.stage), expected):
                    raise CheckpointError(
                        f"{kind} of {spec.name} on stage {place.stage} was not written as it was read"
                    )
    if not torch.equal(written.steps(), source.steps()):
        raise CheckpointError("the optimizer's step was not written as it was read")


def _write_model(
    source: WeightSource,
    model: ModelConfig,
    weight: Any,
    destination: Path,
    options: Options,
    *,
    keeps_function: bool = True,
) -> Proof:
    """Write, read back, compare, publish.

    Args:
        weight: whole parameter of the new model.
        keeps_function: the logits must be those of the source.
    """
    _require_free(destination, options)
    tokenizer = source_tokenizer(source, options.tokenizer)
    input_ids = text_ids(tokenizer, model)
    with _staged(destination) as staged:
        _fill(staged, model, source.dtype, weight, tokenizer, options)
        written = ModelSource(staged)
        for spec in options.track(model_parameters(model), "checking"):
            if not torch.equal(written.weight(spec), weight(spec)):
                raise CheckpointError(f"{spec.name} was not written as it was read")
        checked = f"{len(model_parameters(model))} tensors are bit-equal"
        if keeps_function:
            difference = largest_difference(source, written, input_ids)
            if difference != 0.0:
                raise CheckpointError(f"the logits on {input_ids.shape[1]} tokens of text differ by {difference:.3g}")
            checked += f", so are the logits on {input_ids.shape[1]} tokens of text"
        if destination.exists():  # in one step, and removed with the hidden folder
            destination.rename(staged.parent / "replaced")
        publish(staged, destination)
    return Proof(destination, checked)


def _fill(
    staged: Path, model: ModelConfig, dtype: torch.dtype, weight: Any, tokenizer: Tokenizer, options: Options
) -> None:
    with ModelDirectoryWriter(staged, model, dtype, tokenizer.end_of_document) as writer:
        for spec in options.track(model_parameters(model), "writing"):
            writer.add(spec.name, weight(spec))
        tokenizer.save(writer.folder)


def _require_free(destination: Path, options: Options) -> None:
    """Nothing is replaced unasked, and never something that is not ours.

    Raises:
        CheckpointError: it exists.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not options.overwrite:
        raise CheckpointError(f"{destination} exists; choose another destination, or --overwrite to replace it")
    try:
        find(destination)
    except CheckpointError as error:
        raise CheckpointError(f"{destination} will not be overwritten: {error}") from error


@contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """A folder of the final name inside a hidden one beside it; removed when the conversion fails."""
    hidden = final.parent / f".converting-{final.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    (hidden / final.name).mkdir(parents=True)
    try:
        yield hidden / final.name
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
