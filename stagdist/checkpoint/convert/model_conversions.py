"""Conversions that write a model directory: export, split, merge; and export as a state dict of PyTorch.

Each writes into a hidden folder, proves the result, and only then gives it its name. The proof compares the
configuration and the hash of every tensor, taken when it was read and when it was read back. Only `split` and
`upcycle`, whose result is another model than their source, also compare logits.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.complete import publish
from stagdist.checkpoint.convert.find import NoTokenizerError, open_training, open_weights, source_tokenizer
from stagdist.checkpoint.convert.proof import prove_logits, text_ids
from stagdist.checkpoint.convert.staging import ConversionOptions, ConversionResult, require_free, staged_folder
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.checkpoint.safetensors_writer import tensor_sha256
from stagdist.checkpoint.text_tokens import tokens_of_tokenizer
from stagdist.checkpoint.weight_source import Track, WeightSource, require_finite
from stagdist.config.loading import differences
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError, ConfigError
from stagdist.files import sync_path
from stagdist.model.precision import DTYPES
from stagdist.parallel.layout import ParameterSpec, model_parameters


@dataclass(frozen=True)
class NewModel:
    """The model that a conversion writes.

    Attributes:
        sources: what its tensors are read from. The first also gives the tokenizer and the special tokens.
        config: configuration of the new model.
        weight: returns a global parameter of the new model.
        dtype: of the stored weights, to which `weight` is rounded.
        equal_to: what every tensor is proved to be, as text for the user.
        logits_of: the result must have the logits of this model. None where model and tensors are those of the
            source: the same forward pass over the same bits proves nothing.
        prove: another comparison of the written directory; returns what it compared, as text for the user.
        check_sources: compare the sources with their records.
    """

    sources: Sequence[WeightSource]
    config: ModelConfig
    weight: Callable[[ParameterSpec], Tensor]
    dtype: torch.dtype
    equal_to: str = "bit-equal"
    logits_of: WeightSource | None = None
    prove: Callable[[ModelReader], str] | None = None
    check_sources: bool = True


def export(
    source: str | Path,
    destination: str | Path,
    options: ConversionOptions,
    *,
    precision: str | None = None,
    from_master: bool = False,
    as_state_dict: bool = False,
) -> ConversionResult:
    """Convert a training checkpoint of any grid to a model directory.

    Args:
        precision: of the written weights, a name of `DTYPES`; None for that of the run, or fp32 with `from_master`.
        from_master: round the fp32 values of the optimizer, not the weights of a run in a lower precision.
        as_state_dict: write one file instead, a state dict of canonical names for `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: source or destination is refused, or the proof failed; nothing is left behind.
        ConfigError: the options contradict each other.
    """
    final = Path(destination)
    if not as_state_dict:
        require_free(final, options)
    elif final.exists() and not (final.is_file() and options.overwrite):
        raise CheckpointError(f"{destination} exists; choose another file, or --overwrite to replace a file")
    exported = _exported(source, precision, from_master)
    return (_write_state_dict if as_state_dict else write_model)(exported, final, options)


def _write_state_dict(exported: NewModel, destination: Path, options: ConversionOptions) -> ConversionResult:
    """Write a model directory, and give its memory-mapped tensors to `torch.save`, which writes them one by one.

    So the disk needs room for the weights twice, and memory holds one tensor.
    """
    final, specs = destination.resolve(), model_parameters(exported.config)
    with staged_folder(final.with_name(f"{final.name}.model"), ConversionOptions(track=options.track)) as staged:
        written, checked = _write_proved(exported, staged, options)
        torch.save({spec.name: written.weight(spec) for spec in specs}, staged / final.name)
        saved = torch.load(staged / final.name, mmap=True, weights_only=True)
        sums = {spec.name: tensor_sha256(written.weight(spec)) for spec in options.track(specs, "reading")}
        require_same(written.model, lambda spec: saved[spec.name], exported.config, sums, options.track)
        sync_path(staged / final.name)
        (staged / final.name).rename(final)
    return ConversionResult(destination, checked)


def _exported(source: str | Path, precision: str | None, from_master: bool) -> NewModel:
    reader = open_training(source)
    dtype = DTYPES[precision] if precision else torch.float32 if from_master else reader.dtype
    if from_master and dtype == reader.dtype:
        raise ConfigError(
            f"--from-master: the fp32 values of {reader.directory} in {reader.config.training.precision} are the "
            "weights of the run; leave --from-master out"
        )
    # The weights of a run are its fp32 values, rounded to its precision.
    exact = from_master or dtype == reader.dtype
    equal = "bit-equal" if dtype in (reader.dtype, torch.float32) else f"equal, rounded to {precision}"
    return NewModel([reader], reader.model, reader.value if exact else reader.weight, dtype, equal)


def split(source: str | Path, destination: str | Path, options: ConversionOptions) -> ConversionResult:
    """Convert shared weights to separate sections: every section gets its own copy.

    Raises:
        CheckpointError: the sections of the source share nothing; else as `export`.
    """
    require_free(Path(destination), options)
    weights = open_weights(source)
    if not weights.model.share_section_weights:
        raise CheckpointError(f"{weights.directory}: its sections share no weights, there is nothing to split")
    model = ModelConfig.model_validate(weights.model.model_dump() | {"share_section_weights": False})
    shared = {spec.name: spec for spec in model_parameters(weights.model)}

    def weight(spec: ParameterSpec) -> Tensor:
        if spec.name in shared:
            return weights.weight(shared[spec.name])
        _, _, rest = spec.name.split(".", 2)
        return weights.weight(shared[f"sections.0.{rest}"])

    return write_model(NewModel([weights], model, weight, weights.dtype, logits_of=weights), Path(destination), options)


def merge(sources: Sequence[str | Path], destination: str | Path, options: ConversionOptions) -> ConversionResult:
    """Average several checkpoints or model directories of one model.

    Raises:
        CheckpointError: there is only one source; models, dtypes or tokenizers differ; else as `export`.
    """
    if len(sources) < 2:
        raise CheckpointError(f"merge needs two sources at least, {sources[0]} is one; export copies a single one")
    require_free(Path(destination), options)
    opened = [open_weights(source) for source in sources]
    first = opened[0]
    for other in opened[1:]:
        if changed := differences(first.model, other.model):
            raise CheckpointError(
                f"{other.directory} is another model than {first.directory}: "
                + ", ".join(f"{key} {old!r} and {new!r}" for key, (old, new) in changed.items())
            )
        if other.dtype != first.dtype:
            raise CheckpointError(
                f"{other.directory} is {other.dtype}, {first.directory} {first.dtype}; merge models of one type"
            )
    if options.tokenizer is None:
        _require_one_tokenizer(opened)

    def average(spec: ParameterSpec) -> Tensor:
        total = torch.zeros(spec.shape)
        for one in opened:
            total += one.weight(spec)  # in fp32, without a copy in fp32
        return total.div_(len(opened))

    equal_to = f"equal to the mean of {len(opened)} in fp32, rounded once"
    return write_model(NewModel(opened, first.model, average, first.dtype, equal_to), Path(destination), options)


def _require_one_tokenizer(opened: Sequence[WeightSource]) -> None:
    """Sources that have a tokenizer must have the same one. If the first has none, writing reports it."""
    known: list[tuple[WeightSource, str]] = []
    for one in opened:
        with suppress(NoTokenizerError):
            known.append((one, source_tokenizer(one, None).fingerprint))
    for one, fingerprint in known:
        if fingerprint != known[0][1]:
            raise CheckpointError(
                f"{one.directory} has another tokenizer than {known[0][0].directory}; merge models of one "
                "tokenizer, or name the tokenizer of the result with --tokenizer"
            )


def write_model(new: NewModel, destination: Path, options: ConversionOptions) -> ConversionResult:
    """Write a model directory, read it back, compare it, and give it its name.

    Raises:
        CheckpointError: as `export`.
    """
    with staged_folder(destination, options) as staged:
        _, checked = _write_proved(new, staged, options)
        publish(staged, destination.resolve())
    return ConversionResult(destination, checked)


def _write_proved(new: NewModel, folder: Path, options: ConversionOptions) -> tuple[ModelReader, str]:
    """Write a model directory and compare it with its sources; returns it, and what was proved as text."""
    source = new.sources[0]
    tokenizer = source_tokenizer(source, options.tokenizer)
    tokens = (source.tokens if options.tokenizer is None else None) or tokens_of_tokenizer(tokenizer)
    sums: dict[str, str] = {}
    with ModelDirectoryWriter(folder, new.config, new.dtype, tokenizer.end_of_document, tokens) as writer:
        for spec in options.track(model_parameters(new.config), "writing"):
            tensor = require_finite(new.weight(spec), spec.name, source.directory, new.dtype)
            sums[spec.name] = tensor_sha256(tensor, new.dtype)
            writer.add(spec.name, tensor)
        tokenizer.save(folder)
    for one in new.sources if new.check_sources else ():
        one.check()
    written = ModelReader(folder)
    require_same(written.model, written.weight, new.config, sums, options.track)
    checked = f"{len(sums)} tensors are {new.equal_to}"
    if new.logits_of is not None:
        checked += prove_logits(new.logits_of, written, text_ids(tokenizer, new.config), options.track)
    if new.prove is not None:
        checked += new.prove(written)
    return written, checked


def require_same(
    written: ModelConfig,
    read_back: Callable[[ParameterSpec], Tensor],
    model: ModelConfig,
    sums: Mapping[str, str],
    track: Track[Any],
) -> None:
    """Compare the configuration and the bits of every tensor with what was to be written.

    Args:
        written: configuration that was read back.
        sums: sha256 of every tensor that was to be written, by canonical name.

    Raises:
        CheckpointError: one differs.
    """
    if changed := sorted(differences(model, written)):
        raise CheckpointError(f"{changed[0]} was not written as it was read")
    for spec in track(model_parameters(model), "checking"):
        if tensor_sha256(read_back(spec)) != sums[spec.name]:
            raise CheckpointError(f"{spec.name} was not written as it was read")
