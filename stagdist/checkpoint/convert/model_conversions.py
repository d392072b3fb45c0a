"""Conversions that write a model directory: export, split, merge.

Each writes under a hidden name, proves the result, and only then gives it its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stagdist.checkpoint.convert.find import (
    ChangedTokenizerError,
    ModelSource,
    WeightSource,
    open_training,
    open_weights,
    source_tokenizer,
)
from stagdist.checkpoint.convert.proof import text_ids
from stagdist.checkpoint.convert.staging import Options, Proof, prove_logits, put_in_place, require_free, staged_folder
from stagdist.checkpoint.published.writer import ModelDirectoryWriter
from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.config.loading import differences
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import ParameterSpec, model_parameters

Weight = Callable[[ParameterSpec], Tensor]
"""Whole parameter of the new model."""


@dataclass(frozen=True)
class _InMemory:
    """A model by its formula, before it is written."""

    directory: Path
    model: ModelConfig
    dtype: torch.dtype
    weight: Weight
    tokens: TextTokens | None = None


def export(source: str | Path, destination: str | Path, options: Options) -> Proof:
    """Training checkpoint (any grid) to model directory.

    Raises:
        CheckpointError: source or destination will not do, or the proof failed; nothing is left behind.
    """
    require_free(Path(destination), "model", options)
    reader = open_training(source, trust_pickle=options.trust_pickle)
    return write_model(reader, reader.model, reader.weight, Path(destination), options)


def split(source: str | Path, destination: str | Path, options: Options) -> Proof:
    """Shared weights to separate sections: every section gets a copy of its own.

    Raises:
        CheckpointError: the sections of the source share nothing; else as `export`.
    """
    require_free(Path(destination), "model", options)
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

    return write_model(weights, model, weight, Path(destination), options)


def merge(sources: Sequence[str | Path], destination: str | Path, options: Options) -> Proof:
    """The average of several checkpoints or model directories of one model, as a model directory.

    Raises:
        CheckpointError: there is only one; the models differ, by key, or types or tokenizers do; else as `export`.
    """
    if len(sources) < 2:
        raise CheckpointError(f"merge needs two sources at least, {sources[0]} is one; export copies a single one")
    require_free(Path(destination), "model", options)
    opened = [open_weights(source, trust_pickle=options.trust_pickle) for source in sources]
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
    """Sources that have a tokenizer must have the same; where the first has none, writing will say so."""
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
                f"{one.directory} has another tokenizer than {known[0][0].directory}; models of one tokenizer can be "
                "merged, or name the one to go with the result with --tokenizer"
            )


def write_model(
    source: WeightSource,
    model: ModelConfig,
    weight: Weight,
    destination: Path,
    options: Options,
    *,
    keeps_function: bool = True,
    equal_to: str | None = None,
) -> Proof:
    """Write, read back, compare, publish.

    Args:
        weight: whole parameter of the new model.
        keeps_function: the logits must be those of the source; otherwise, and with `equal_to`, those of `weight`.
        equal_to: what the tensors are proved to be, for a person, where they are not the source's.

    Raises:
        CheckpointError: as `export`.
    """
    require_free(destination, "model", options)
    tokenizer = source_tokenizer(source, options.tokenizer)
    input_ids = text_ids(tokenizer, model)
    keeps_function = keeps_function and equal_to is None
    with staged_folder(destination, "model", options) as staged:
        tokens = source.tokens if options.tokenizer is None else None
        with ModelDirectoryWriter(staged, model, source.dtype, tokenizer.end_of_document, tokens) as writer:
            for spec in options.track(model_parameters(model), "writing"):
                writer.add(spec.name, weight(spec))
            tokenizer.save(writer.folder)
        written = ModelSource(staged)
        for spec in options.track(model_parameters(model), "checking"):
            if not torch.equal(written.weight(spec), weight(spec)):
                raise CheckpointError(f"{spec.name} was not written as it was read")
        proved = "bit-equal" if keeps_function else equal_to or "equal to their rules"
        checked = f"{len(model_parameters(model))} tensors are {proved}"
        expected = source if keeps_function else _InMemory(staged, model, source.dtype, weight)
        checked += prove_logits(expected, written, input_ids, options.track)
        put_in_place(staged, destination.resolve())
    return Proof(destination, checked)
