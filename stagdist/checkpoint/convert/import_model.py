"""Import a model directory as a training checkpoint at step 0, which a run on any grid can start from."""

from pathlib import Path

import torch

from stagdist.checkpoint.complete import publish
from stagdist.checkpoint.convert.find import open_model, source_tokenizer
from stagdist.checkpoint.convert.model_conversions import require_same
from stagdist.checkpoint.convert.staging import ConversionOptions, ConversionResult, require_free, staged_folder
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.training.directory import STEP_FOLDER, TrainingState, candidates, checkpoint_name
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.checkpoint.training.writer import write_values
from stagdist.config.loading import differences, dump_config, load_config, validate
from stagdist.config.run_config import RunConfig
from stagdist.data.tokenizer import BYTES, Tokenizer
from stagdist.data.tokenizer_files import holds_tokenizer, load_tokenizer
from stagdist.errors import CheckpointError, ConfigError, DataError

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def import_model(
    source: str | Path, destination: str | Path, config_file: str | None, options: ConversionOptions
) -> ConversionResult:
    """Convert a model directory to a training checkpoint at step 0, from which `pretrain` starts.

    The proof compares configuration and state, and the hash of every tensor, taken when it was read and when it was
    read back. fp32 represents all values of the other dtypes, so the tensors are bit-equal.

    Args:
        destination: the folder of a run, or `checkpoints/step_00000000` in it.
        config_file: configuration of the new run; its precision, optimizer and tokenizer are used.

    Raises:
        CheckpointError: source or destination is refused, or the proof failed; nothing is left behind.
        ConfigError: the configuration is of another model, or names another tokenizer than the directory or the
            options.
    """
    final = _final(Path(destination))
    require_free(final, options)
    weights = open_model(source)
    config = _run_config(weights, final, config_file, options)
    tokenizer = None
    if options.tokenizer is not None or holds_tokenizer(weights.directory):
        tokenizer = source_tokenizer(weights, options.tokenizer)
    if config_file is not None and tokenizer is not None:
        _require_tokenizer(config_file, config.data.tokenizer, weights, tokenizer, options)
    # The special tokens are ids of the tokenizer of the directory, so another tokenizer needs others.
    tokens = weights.tokens if options.tokenizer is None and tokenizer is not None else None
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint
    state = TrainingState(0, 0, 0, (1, 1, 1), tokenizer=fingerprint, documents_begin=True, text_tokens=tokens)
    with staged_folder(final, options) as staged:
        sums = write_values(staged, weights, config, state, options.track)
        weights.check()
        written = TrainingReader(staged)
        if written.state != state or dump_config(written.config) != dump_config(config):
            raise CheckpointError("state or configuration was not written as it was read")
        require_same(written.model, written.value, weights.model, sums, options.track)
        publish(staged, final.resolve())
    return ConversionResult(final, f"{len(sums)} tensors are bit-equal")


def _final(destination: Path) -> Path:
    """The path of the checkpoint: `destination` if it is named like one, else a folder in its `checkpoints`.

    Raises:
        CheckpointError: it is named like another step, or the run has checkpoints.
    """
    match = STEP_FOLDER.fullmatch(destination.name)
    if match and int(match[1]) != 0:
        raise CheckpointError(f"{destination} is named like step {int(match[1])}, the checkpoint is of step 0")
    final = destination if match else destination / "checkpoints" / checkpoint_name(0)
    if found := candidates(final.parent):
        raise CheckpointError(
            f"{final.parent} holds {found[0].name}, from which a run would continue; choose another run"
        )
    return final


def _run_config(weights: ModelReader, final: Path, config_file: str | None, options: ConversionOptions) -> RunConfig:
    if config_file is not None:
        config = load_config(config_file)
        if changed := differences(config.model, weights.model):
            listed = ", ".join(
                f"model.{key} is {old!r}, the directory has {new!r}" for key, (old, new) in changed.items()
            )
            raise ConfigError(f"{config_file} describes another model than {weights.directory}: {listed}")
        if config.training.precision == "fp16":
            raise ConfigError(f"{config_file}: training.precision is fp16; import for fp32 or bf16")
        return config
    if weights.dtype not in _PRECISIONS:
        raise CheckpointError(
            f"{weights.directory} is {weights.dtype}; give --config with training.precision fp32 or bf16"
        )
    keys = {
        "name": final.parent.parent.name or "imported",
        "model": weights.model.model_dump(mode="json"),
        "data": {"tokenizer": _tokenizer_place(weights, options)},
        "training": {"steps": 1, "global_batch_size": 1, "precision": _PRECISIONS[weights.dtype]},
    }
    made, problems = validate(keys)
    if made is None or problems:
        raise ConfigError(f"{weights.directory}: {'; '.join(problems)}")
    return made


def _tokenizer_place(weights: ModelReader, options: ConversionOptions) -> str:
    """Path of the tokenizer of an imported model; absolute, so that it is found from every working directory."""
    return BYTES if options.tokenizer == BYTES else str(Path(options.tokenizer or weights.directory).resolve())


def _require_tokenizer(
    config_file: str, named: str, weights: ModelReader, tokenizer: Tokenizer, options: ConversionOptions
) -> None:
    """The new run must use the tokenizer that is recorded with the weights.

    Args:
        named: data.tokenizer of the configuration.
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
