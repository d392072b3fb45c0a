"""Conversions that write a training checkpoint: reshard, import.

Each writes under a hidden name, proves the result, and only then gives it its name.
"""

from dataclasses import replace
from pathlib import Path

import torch

from stagdist.checkpoint.imported import ImportedModel
from stagdist.checkpoint.proof import any_text_ids
from stagdist.checkpoint.sources import (
    STEP_FOLDER,
    ModelSource,
    WeightSource,
    check_tokenizer,
    open_model,
    open_training,
)
from stagdist.checkpoint.staging import (
    Options,
    Proof,
    prove_logits,
    put_in_place,
    require_makeable,
    staged_folder,
)
from stagdist.checkpoint.training_comparison import require_same
from stagdist.checkpoint.training_directory import (
    CONFIG,
    STATE,
    TrainingState,
    candidates,
    checkpoint_files,
    checkpoint_name,
    expected_files,
    file_record,
    write_complete,
)
from stagdist.checkpoint.training_reader import TrainingReader
from stagdist.checkpoint.training_source import DTYPES, KINDS, TrainingSource
from stagdist.checkpoint.training_writer import TrainingWriter
from stagdist.config import RunConfig, require_world
from stagdist.config_loading import differences, dump_config, load_config, validate
from stagdist.errors import CheckpointError, ConfigError
from stagdist.parallel.grid import Grid
from stagdist.parallel.layout import model_parameters


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
    require_makeable(Path(destination))
    reader = open_training(source, trust_pickle=options.trust_pickle, files_checked=options.files_checked)
    config = on_grid(reader.config if config is None else config, grid)
    state = replace(reader.state, grid=(grid.pipe, grid.data, grid.tensor))
    final = training_destination(Path(destination), state.step)
    logits = _write_training(reader, config, state, final, reader, options)
    tensors = len(list(reader.specs())) * (1 + len(KINDS))
    return Proof(
        final, f"{tensors} tensors, optimizer's included, are bit-equal on all {grid.world_size} ranks{logits}"
    )


def import_model(
    source: str | Path, destination: str | Path, grid: Grid, config_file: str | None, options: Options
) -> Proof:
    """Model directory to a training checkpoint at step 0 that `pretrain` begins from.

    Args:
        config_file: configuration of the run to come; its precision and optimizer are used.

    Raises:
        CheckpointError, ConfigError: as `reshard`; the configuration is of another model, by key.
    """
    require_makeable(Path(destination))
    weights = open_model(source)
    if options.tokenizer is None:
        check_tokenizer(weights.directory)  # the run to come will read it there
    config = _import_config(weights, Path(destination), grid, config_file, options)
    state = TrainingState(0, 0, 0, (grid.pipe, grid.data, grid.tensor))
    final = training_destination(Path(destination), 0)
    others = [path for path in candidates(final.parent) if path != final]
    if others:
        raise CheckpointError(
            f"{final.parent} holds {others[0].name}, which a run would go on from; choose another run"
        )
    imported = ImportedModel(weights, config)
    exact = DTYPES[config.training.precision] in (weights.dtype, torch.float32)  # fp32 holds what the others hold
    logits = _write_training(imported, config, state, final, weights if exact else None, options)
    rounded = "" if exact else f", rounded to {config.training.precision}"
    return Proof(final, f"{len(model_parameters(weights.model))} tensors are bit-equal{rounded}{logits}")


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
        raise CheckpointError(
            f"{weights.directory} is {weights.dtype}; give --config with training.precision fp32 or bf16"
        )
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
    source: TrainingSource,
    config: RunConfig,
    state: TrainingState,
    final: Path,
    function: WeightSource | None,
    options: Options,
) -> str:
    """Write, read back, compare, publish.

    Args:
        function: whose logits the result must have; None where rounding changes them.

    Returns: what the logits proved, for a person.
    """
    proved, grid = "", Grid(*state.grid)
    with staged_folder(final, "training", options) as staged:
        (staged / CONFIG).write_text(dump_config(config))
        state.write(staged)
        records = {name: file_record(staged / name, sync=True) for name in (CONFIG, STATE)}
        records |= TrainingWriter(source, config, grid, staged).write(options.track)
        written = TrainingReader(staged)
        require_same(written, source, options.track)
        if function is not None:
            proved = prove_logits(function, written, any_text_ids(function, options.tokenizer))
        expected = expected_files(config, state.grid)
        if odd := sorted((expected ^ set(checkpoint_files(staged))) | (expected ^ set(records))):
            raise CheckpointError(f"{final}: {odd[0]} should not have been written, or is missing; convert it again")
        write_complete(staged, records)
        put_in_place(staged, final.resolve())
    return proved
