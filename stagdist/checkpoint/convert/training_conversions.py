"""Conversions that write a training checkpoint: reshard, import.

Each writes into a hidden folder, proves the result, and only then gives it its name. The proof compares every value of
every rank, read back bit by bit.
"""

from pathlib import Path

import torch

from stagdist.checkpoint.convert.find import STEP_FOLDER, open_model, source_tokenizer
from stagdist.checkpoint.convert.staging import (
    ConversionOptions,
    ConversionResult,
    put_in_place,
    require_makeable,
    staged_folder,
)
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.training.directory import TrainingState, candidates, checkpoint_name
from stagdist.checkpoint.training.writer import write_values
from stagdist.config.loading import differences, load_config, validate
from stagdist.config.run_config import RunConfig, require_world
from stagdist.data.tokenizer import BYTES, Tokenizer
from stagdist.data.tokenizer_files import holds_tokenizer, load_tokenizer
from stagdist.errors import CheckpointError, ConfigError, DataError
from stagdist.parallel.grid import Grid
from stagdist.parallel.layout import model_parameters


def import_model(
    source: str | Path, destination: str | Path, grid: Grid, config_file: str | None, options: ConversionOptions
) -> ConversionResult:
    """Convert a model directory to a training checkpoint at step 0, from which `pretrain` starts.

    Args:
        config_file: configuration of the new run; its precision, optimizer and tokenizer are used.

    Raises:
        CheckpointError, ConfigError: as `reshard`; the configuration is of another model, or names another
            tokenizer than the directory or the options.
    """
    require_makeable(Path(destination))
    weights = open_model(source)
    config = _import_config(weights, Path(destination), grid, config_file, options)
    has_tokenizer = options.tokenizer is not None or holds_tokenizer(weights.directory)
    tokenizer = source_tokenizer(weights, options.tokenizer) if has_tokenizer else None
    if config_file is not None and tokenizer is not None:
        _require_tokenizer(config_file, config.data.tokenizer, weights, tokenizer, options)
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint
    # The special tokens are ids of the tokenizer of the directory, so another tokenizer needs others.
    tokens = weights.tokens if options.tokenizer is None and tokenizer is not None else None
    sizes = (grid.pipe, grid.data, grid.tensor)
    state = TrainingState(0, 0, 0, sizes, tokenizer=fingerprint, documents_begin=True, text_tokens=tokens)
    final = training_destination(Path(destination), 0)
    others = [path for path in candidates(final.parent) if path != final]
    if others:
        raise CheckpointError(
            f"{final.parent} holds {others[0].name}, from which a run would continue; choose another run"
        )
    with staged_folder(final, "training", options) as staged:
        write_values(staged, weights, config, state, options.track)
        put_in_place(staged, final.resolve())
    return ConversionResult(final, f"{len(model_parameters(weights.model))} tensors are bit-equal")


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
    """Path of the training checkpoint: `destination` if it is named like one, else a folder in its `checkpoints`.

    Raises:
        CheckpointError: it is named like another step.
    """
    match = STEP_FOLDER.fullmatch(destination.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{destination} is named like step {int(match[1])}, the checkpoint is of step {step}")
    return destination if match else destination / "checkpoints" / checkpoint_name(step)


def _import_config(
    weights: ModelReader, destination: Path, grid: Grid, config_file: str | None, options: ConversionOptions
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
        "data": {"tokenizer": _tokenizer_place(weights, options)},
        "training": {"steps": 1, "global_batch_size": grid.data, "precision": precisions[weights.dtype]},
    }
    made, problems = validate(keys)
    if made is None or problems:
        raise ConfigError(f"{weights.directory}: {'; '.join(problems)}")
    return on_grid(made, grid)


def _tokenizer_place(weights: ModelReader, options: ConversionOptions) -> str:
    """Path of the tokenizer of an imported model; absolute, so that it is found from every working directory."""
    return BYTES if options.tokenizer == BYTES else str(Path(options.tokenizer or weights.directory).resolve())


def _require_tokenizer(
    config_file: str, named: str, weights: ModelReader, tokenizer: Tokenizer, options: ConversionOptions
) -> None:
    """The new run must use the tokenizer that is recorded with the weights.

    Args:
        named: data.tokenizer of the configuration.

    Raises:
        ConfigError: it uses another one, or the tokenizer cannot be loaded.
    """
    remedy = f"set data.tokenizer to {_tokenizer_place(weights, options)} in {config_file}"
    try:
        now = load_tokenizer(named).fingerprint
    except DataError as error:
        raise ConfigError(f"{config_file}: data.tokenizer cannot be loaded: {error}; {remedy}") from error
    if now == tokenizer.fingerprint:
        return
    given = options.tokenizer is not None
    whose = f"--tokenizer {options.tokenizer}" if given else f"that of {weights.directory}"
    other = "" if given else f", or give --tokenizer {named} if another vocabulary is meant"
    raise ConfigError(
        f"{config_file}: data.tokenizer {named} is another tokenizer than {whose} (sha256 {now[:12]}, there "
        f"{tokenizer.fingerprint[:12]}); {remedy}{other}"
    )
