"""The end of a run: the trained weights as a model directory."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.checkpoint.model_directory import ModelDirectoryWriter
from stagdist.config import ModelConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError
from stagdist.parallel.groups import Groups
from stagdist.parallel.layout import ParameterSpec, model_parameters, stage_layout
from stagdist.training.agreement import on_every_rank
from stagdist.training.pipeline import SectionPipeline


def export_model(
    module: SectionPipeline, groups: Groups, model: ModelConfig, tokenizer: Tokenizer, directory: Path
) -> None:
    """Gather the weights tensor by tensor to rank 0, which writes them. Called on every rank.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write; nothing is left behind.
    """
    parameters = {name: parameter.detach() for name, parameter in module.canonical_parameters().items()}
    dtype = next(iter(parameters.values())).dtype
    writer = ModelDirectoryWriter(directory, model, dtype, tokenizer.end_of_document)
    failure: OSError | None = None
    writes = dist.get_rank() == 0

    def failed(reason: str) -> CheckpointError:
        writer.discard()
        return CheckpointError(
            f"the model directory was not written, {reason}; the last checkpoint is whole: make room and start the "
            "same command again"
        )

    on_every_rank(groups.control, lambda: writer.open() if writes else None, failed)
    for spec in model_parameters(model):
        # Gathered to the end even when a write has failed: the other ranks are sending.
        tensor = _gather(spec, parameters, groups, model)
        if writes and failure is None:
            try:
                writer.add(spec.name, tensor)
            except OSError as error:
                failure = error

    def finish() -> None:
        if failure is not None:
            raise failure
        if writes:
            tokenizer.save(writer.folder)
            writer.commit()

    on_every_rank(groups.control, finish, failed)


def _gather(spec: ParameterSpec, parameters: dict[str, Tensor], groups: Groups, model: ModelConfig) -> Tensor:
    """The whole parameter on rank 0; an empty tensor elsewhere."""
    if spec.name == "section_mix":
        parts = [ParameterSpec(f"section_mix.{section}", (1,), fill=spec.fill) for section in range(model.num_sections)]
        return torch.cat([_gather(part, parameters, groups, model) for part in parts])
    dtype = next(iter(parameters.values())).dtype
    slices = []
    for tensor_rank in range(1 if spec.shard_dim is None else groups.grid.tensor):
        owner = groups.grid.rank(owning_stage(spec, model, groups.grid.pipe), 0, tensor_rank)
        slices.append(_fetch(owner, spec, parameters, groups, dtype))
    if dist.get_rank() != 0:
        return torch.empty(0)
    whole = slices[0] if spec.shard_dim is None else torch.cat(slices, dim=spec.shard_dim)
    return whole[: spec.shape[0]] if spec.vocabulary else whole


def _fetch(
    owner: int, spec: ParameterSpec, parameters: dict[str, Tensor], groups: Groups, dtype: torch.dtype
) -> Tensor:
    """One rank's slice, brought to rank 0 over the control group."""
    if dist.get_rank() == owner:
        tensor = parameters[spec.name].cpu().contiguous()
        if owner != 0:
            dist.send(tensor, 0, group=groups.control)
        return tensor
    if dist.get_rank() == 0:
        tensor = torch.empty(spec.local_shape(groups.grid.tensor), dtype=dtype)
        dist.recv(tensor, owner, group=groups.control)
        return tensor
    return torch.empty(0)


def owning_stage(spec: ParameterSpec, model: ModelConfig, pipe_size: int) -> int:
    """The first stage that holds a parameter."""
    if spec.name == "embedding.weight":
        return 0
    kind, _, rest = spec.name.partition(".")
    if kind in ("sections", "section_mix"):
        section = int(rest.split(".")[0])
        return next(s for s in range(pipe_size) if section in stage_layout(model, pipe_size, s).sections)
    return pipe_size - 1
