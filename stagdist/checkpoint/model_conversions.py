"""Conversions that write a model directory: export, split, merge.

Each writes under a hidden name, proves the result, and only then gives it its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stagdist.checkpoint.model_directory import ModelDirectoryWriter
from stagdist.checkpoint.proof import text_ids
from stagdist.checkpoint.sources import ModelSource, WeightSource, open_training, open_weights, source_tokenizer
from stagdist.checkpoint.staging import Options, Proof, prove_logits, require_free, staged_folder
from stagdist.checkpoint.training_directory import publish
from stagdist.config import ModelConfig
from stagdist.config_loading import differences
from stagdist.data.tokenizer import Tokenizer
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


def export(source: str | Path, destination: str | Path, options: Options) -> Proof:
    """Training checkpoint (any grid) to model directory.

    Raises:
        CheckpointError: source or destination will not do, or the proof failed; nothing is left behind.
    """
    reader = open_training(source, trust_pickle=options.trust_pickle)
    return write_model(reader, reader.model, reader.weight, Path(destination), options)


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

    return write_model(weights, model, weight, Path(destination), options)


def merge(sources: Sequence[str | Path], destination: str | Path, options: Options) -> Proof:
    """The average of several checkpoints or model directories of one model, as a model directory.

    Raises:
        CheckpointError: there is only one; the models differ, by key; else as `export`.
    """
    if len(sources) < 2:
        raise CheckpointError(f"merge needs two sources at least, {sources[0]} is one; export copies a single one")
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

    return write_model(opened[0], opened[0].model, average, Path(destination), options, keeps_function=False)


def write_model(
    source: WeightSource,
    model: ModelConfig,
    weight: Weight,
    destination: Path,
    options: Options,
    *,
    keeps_function: bool = True,
) -> Proof:
    """Write, read back, compare, publish.

    Args:
        weight: whole parameter of the new model.
        keeps_function: the logits must be those of the source; otherwise those of `weight`.

    Raises:
        CheckpointError: as `export`.
    """
    require_free(destination, "model", options)
    tokenizer = source_tokenizer(source, options.tokenizer)
    input_ids = text_ids(tokenizer, model)
    with staged_folder(destination) as staged:
        _fill(staged, model, source.dtype, weight, tokenizer, options)
        written = ModelSource(staged)
        for spec in options.track(model_parameters(model), "checking"):
            if not torch.equal(written.weight(spec), weight(spec)):
                raise CheckpointError(f"{spec.name} was not written as it was read")
        checked = f"{len(model_parameters(model))} tensors are bit-equal"
        expected = source if keeps_function else _InMemory(staged, model, source.dtype, weight)
        checked += prove_logits(expected, written, input_ids)
        if destination.exists():  # in one step, and removed with the hidden folder
            destination.rename(staged.parent / "replaced")
        publish(staged, destination)
    return Proof(destination, checked)


def _fill(
    staged: Path, model: ModelConfig, dtype: torch.dtype, weight: Weight, tokenizer: Tokenizer, options: Options
) -> None:
    with ModelDirectoryWriter(staged, model, dtype, tokenizer.end_of_document) as writer:
        for spec in options.track(model_parameters(model), "writing"):
            writer.add(spec.name, weight(spec))
        tokenizer.save(writer.folder)
