"""Conversions that write a training checkpoint: reshard, import.

Each writes under a hidden name, proves the result, and only then gives it its name.
"""

from dataclasses import replace
from pathlib import Path

import torch

from stagdist.checkpoint.convert.find import (
    STEP_FOLDER,
    ModelSource,
    WeightSource,
    open_model,
    open_training,
    source_tokenizer,
)
from stagdist.checkpoint.convert.proof import any_text_ids
from stagdist.checkpoint.convert.staging import (
    Options,
    Proof,
    prove_logits,
    put_in_place,
    require_makeable,
    staged_folder,
)
from stagdist.checkpoint.training.comparison import require_same
from stagdist.checkpoint.training.content import KINDS, TrainingSource
from stagdist.checkpoint.training.directory import (
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
from stagdist.checkpoint.training.imported import ImportedModel
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.checkpoint.training.writer import TrainingWriter
from stagdist.config.loading import differences, dump_config, load_config, validate
from stagdist.config.run_config import RunConfig, require_world
from stagdist.data.tokenizer import BYTES, Tokenizer, holds_tokenizer, load_tokenizer
from stagdist.errors import CheckpointError, ConfigError, DataError
from stagdist.model.precision import DTYPES
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
        config_file: configuration of the run to come; its precision, optimizer and tokenizer are used.

    Raises:
        CheckpointError, ConfigError: as `reshard`; the configuration is of another model, by key, or names another
            tokenizer than the directory or the options do.
    """
    require_makeable(Path(destination))
    weights = open_model(source)
    config = _import_config(weights, Path(destination), grid, config_file, options)
    tokenizer = _import_tokenizer(weights, options)
    if config_file is not None and tokenizer is not None:
        _require_tokenizer(config_file, config.data.tokenizer, weights, tokenizer, options)
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint
    # They are numbers of the directory's own tokenizer.
    tokens = weights.tokens if options.tokenizer is None and tokenizer is not None else None
    sizes = (grid.pipe, grid.data, grid.tensor)
    state = TrainingState(0, 0, 0, sizes, tokenizer=fingerprint, text_tokens=tokens)
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
        "data": {"tokenizer": _tokenizer_place(weights, options)},
        "training": {"steps": 1, "global_batch_size": grid.data, "precision": precisions[weights.dtype]},
    }
    made, problems = validate(keys)
    if made is None or problems:
        raise ConfigError(f"{weights.directory}: {'; '.join(problems)}")
    return on_grid(made, grid)


def _tokenizer_place(weights: ModelSource, options: Options) -> str:
    """Where the tokenizer of an imported model lies, from whichever folder the checkpoint is read."""
    return BYTES if options.tokenizer == BYTES else str(Path(options.tokenizer or weights.directory).resolve())


def _import_tokenizer(weights: ModelSource, options: Options) -> Tokenizer | None:
    """The tokenizer of an imported model: as given, else that of the directory; None where that has none."""
    if options.tokenizer is None and not holds_tokenizer(weights.directory):
        return None
    return source_tokenizer(weights, options.tokenizer)


def _require_tokenizer(
    config_file: str, named: str, weights: ModelSource, tokenizer: Tokenizer, options: Options
) -> None:
    """The run to come must make token ids as the tokenizer does that is recorded with the weights.

    Args:
        named: data.tokenizer of the configuration.

    Raises:
        ConfigError: it is another one, or cannot be loaded.
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
        if written.state.as_text() != state.as_text() or dump_config(written.config) != dump_config(config):
            raise CheckpointError(f"{final}: {STATE} or {CONFIG} reads as something else than was written")
        require_same(written, source, options.track)
        if function is not None:
            proved = prove_logits(function, written, any_text_ids(function, options.tokenizer), options.track)
        expected = expected_files(config, state.grid)
        if odd := sorted((expected ^ set(checkpoint_files(staged))) | (expected ^ set(records))):
            raise CheckpointError(f"{final}: {odd[0]} should not have been written, or is missing; convert it again")
        write_complete(staged, records)
        put_in_place(staged, final.resolve())
    return proved
