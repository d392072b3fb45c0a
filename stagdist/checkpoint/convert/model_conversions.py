"""Conversions that write a model directory: export, split, merge.

Each writes into a hidden folder, proves the result, and only then gives it its name. The proof compares the
configuration and every tensor, read back bit by bit. Only `split` and `upcycle`, whose result is another model than
their source, also compare logits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stagdist.checkpoint.convert.find import open_training, open_weights, source_tokenizer
from stagdist.checkpoint.convert.proof import prove_logits, text_ids
from stagdist.checkpoint.convert.staging import (
    ConversionOptions,
    ConversionResult,
    put_in_place,
    require_free,
    staged_folder,
)
from stagdist.checkpoint.published.model_reader import ChangedTokenizerError, ModelReader
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.checkpoint.safetensors_writer import tensor_sha256
from stagdist.checkpoint.text_tokens import tokens_of_tokenizer
from stagdist.checkpoint.weight_source import WeightSource, require_finite
from stagdist.config.loading import differences
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import ParameterSpec, model_parameters

Weight = Callable[[ParameterSpec], Tensor]
"""Returns a global parameter of the new model."""


def export(source: str | Path, destination: str | Path, options: ConversionOptions) -> ConversionResult:
    """Convert a training checkpoint of any grid to a model directory.

    Raises:
        CheckpointError: source or destination is refused, or the proof failed; nothing is left behind.
    """
    require_free(Path(destination), "model", options)
    reader = open_training(
        source,
    )
    return write_model(reader, reader.model, reader.weight, Path(destination), options)


def split(source: str | Path, destination: str | Path, options: ConversionOptions) -> ConversionResult:
    """Convert shared weights to separate sections: every section gets its own copy.

    Raises:
        CheckpointError: the sections of the source share nothing; else as `export`.
    """
    require_free(Path(destination), "model", options)
    weights = open_weights(
        source,
    )
    if not weights.model.share_section_weights:
        raise CheckpointError(f"{weights.directory}: its sections share no weights, there is nothing to split")
    model = ModelConfig.model_validate(weights.model.model_dump() | {"share_section_weights": False})
    shared = {spec.name: spec for spec in model_parameters(weights.model)}

    def weight(spec: ParameterSpec) -> Tensor:
        if spec.name in shared:
            return weights.weight(shared[spec.name])
        _, _, rest = spec.name.split(".", 2)
        return weights.weight(shared[f"sections.0.{rest}"])

    return write_model(weights, model, weight, Path(destination), options, logits_of=weights)


def merge(sources: Sequence[str | Path], destination: str | Path, options: ConversionOptions) -> ConversionResult:
    """Average several checkpoints or model directories of one model.

    Raises:
        CheckpointError: there is only one source; models, dtypes or tokenizers differ; else as `export`.
    """
    if len(sources) < 2:
        raise CheckpointError(f"merge needs two sources at least, {sources[0]} is one; export copies a single one")
    require_free(Path(destination), "model", options)
    opened = [
        open_weights(
            source,
        )
        for source in sources
    ]
    for other in opened[1:]:
        changed = differences(opened[0].model, other.model)
        if changed:
            raise CheckpointError(
                f"{other.directory} is another model than {opened[0].directory}: "
                + ", ".join(f"{key} {old!r} and {new!r}" for key, (old, new) in changed.items())
            )
        if other.dtype != opened[0].dtype:
            raise CheckpointError(
                f"{other.directory} is {other.dtype}, {opened[0].directory} {opened[0].dtype}; merge models of one type"
            )
    if options.tokenizer is None:
        _require_one_tokenizer(opened)

    def average(spec: ParameterSpec) -> Tensor:
        total = torch.zeros(spec.shape)
        for one in opened:
            total += one.weight(spec).float()
        return (total / len(opened)).to(opened[0].dtype)

    equal_to = f"equal to the mean of {len(opened)} in fp32, rounded once"
    return write_model(opened[0], opened[0].model, average, Path(destination), options, equal_to=equal_to)


def _require_one_tokenizer(opened: Sequence[WeightSource]) -> None:
    """Sources that have a tokenizer must have the same one. If the first has none, writing reports it."""
    known: list[tuple[WeightSource, str]] = []
    for one in opened:
        try:
            known.append((one, source_tokenizer(one, None).fingerprint))
        except ChangedTokenizerError:
            raise
        except CheckpointError:  # it has none
            continue
    for one, fingerprint in known:
        if fingerprint != known[0][1]:
            raise CheckpointError(
                f"{one.directory} has another tokenizer than {known[0][0].directory}; merge models of one "
                "tokenizer, or name the tokenizer of the result with --tokenizer"
            )


def write_model(
    source: WeightSource,
    model: ModelConfig,
    weight: Weight,
    destination: Path,
    options: ConversionOptions,
    *,
    equal_to: str = "bit-equal",
    logits_of: WeightSource | None = None,
) -> ConversionResult:
    """Write a model directory, read it back, compare it, and give it its name.

    Args:
        source: provides the dtype, the tokenizer and the special tokens.
        model: configuration of the new model.
        weight: returns a parameter of the new model.
        equal_to: what every tensor is proved to be, as text for the user.
        logits_of: the result must have the logits of this model. None where model and tensors are those of the
            source: the same forward pass over the same bits proves nothing.

    Raises:
        CheckpointError: as `export`.
    """
    require_free(destination, "model", options)
    tokenizer = source_tokenizer(source, options.tokenizer)
    sums: dict[str, str] = {}
    with staged_folder(destination, "model", options) as staged:
        tokens = (source.tokens if options.tokenizer is None else None) or tokens_of_tokenizer(tokenizer)
        with ModelDirectoryWriter(staged, model, source.dtype, tokenizer.end_of_document, tokens) as writer:
            for spec in options.track(model_parameters(model), "writing"):
                tensor = weight(spec)
                if logits_of is not None:
                    require_finite(tensor, spec.name, source.directory)
                sums[spec.name] = tensor_sha256(tensor)
                writer.add(spec.name, tensor)
            tokenizer.save(staged)
        written = ModelReader(staged)
        _require_same(written, model, source.dtype, sums, options)
        checked = f"{len(sums)} tensors are {equal_to}"
        if logits_of is not None:
            checked += prove_logits(logits_of, written, text_ids(tokenizer, model), options.track)
        put_in_place(staged, destination.resolve())
    return ConversionResult(destination, checked)


def _require_same(
    written: ModelReader, model: ModelConfig, dtype: torch.dtype, sums: dict[str, str], options: ConversionOptions
) -> None:
    """Compare configuration, dtype and the bits of every tensor with what was to be written."""
    changed = sorted(differences(model, written.model))
    if changed or written.dtype != dtype:
        raise CheckpointError(f"{changed[0] if changed else 'the dtype'} was not written as it was read")
    for spec in options.track(model_parameters(model), "checking"):
        if tensor_sha256(written.weight(spec)) != sums[spec.name]:
            raise CheckpointError(f"{spec.name} was not written as it was read")
