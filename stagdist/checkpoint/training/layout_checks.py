"""Check that a training checkpoint agrees with its configuration, and that it equals what it was written from."""

from itertools import product
from typing import Any

import torch

from stagdist.checkpoint.training.content import KINDS, MASTER, Counters, Track, TrainingSource
from stagdist.checkpoint.training.file_structure import same
from stagdist.checkpoint.training.stage_files import extra_keys, model_states_file, optimizer_file, pipeline_layers
from stagdist.checkpoint.training.training_reader import TrainingReader
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import ParameterSpec


def require_same(written: TrainingReader, source: TrainingSource, track: Track[Any]) -> None:
    """Compare every value of every rank with the source, including copies, step, counters, settings and generators.

    Raises:
        CheckpointError: something differs; the message names it.
    """
    check_layout(written)
    for spec in track(list(written.specs()), "checking"):
        for where, weight in written.weight_copies(spec):
            if not torch.equal(weight, source.weight(spec)):
                raise CheckpointError(f"{spec.name}{where} was not written as it was read")
        for kind in KINDS:
            expected = source.optimizer_value(spec, kind)
            for where, value in written.optimizer_copies(spec, kind):
                if not torch.equal(value, expected):
                    raise CheckpointError(f"{kind} of {spec.name}{where} was not written as it was read")
    if not torch.equal(written.steps(), source.steps()):
        raise CheckpointError("the optimizer's step was not written as it was read")
    _require_same_counters(written, source.counters())


def _require_same_counters(written: TrainingReader, expected: Counters) -> None:
    """Compare the counters of the first rank; `check_layout` compares the other ranks with it."""
    found = written.counters()
    names = ["global_steps", "global_samples", "skipped_steps", "param_groups", "clip_grad"]
    names += [] if written.bf16 else ["loss_scaler", "dynamic_loss_scale"]  # the bf16 optimizer has none
    for name in names:
        if not same(getattr(found, name), getattr(expected, name)):
            raise CheckpointError(f"{name} was not written as it was read")
    pipe, _, tensor = written.state.grid
    for stage, rank in product(range(pipe), range(tensor)):
        if not same(found.random(stage, rank), expected.random(stage, rank)):
            raise CheckpointError(
                f"the generators of stage {stage}, tensor rank {rank} were not written as they were read"
            )


def check_layout(reader: TrainingReader) -> None:
    """Compare names, shapes, dtypes and sizes of everything stored with what the model requires.

    The weights must be the rounded fp32 copies on every stage that has one: this detects a partition that is cut at
    another place. Copies on later stages must have the moments of the first, and all ranks the same step, counters and
    settings, because readers use those of one rank.

    Raises:
        CheckpointError: something differs; the message names it.
    """
    for stage, rank in product(range(reader.state.grid[0]), range(reader.state.grid[2])):
        _check_order(reader, stage, rank)
    for layer in pipeline_layers(reader.model):
        if layer.first:
            for rank in range(reader.state.grid[2]):
                _check_keys(reader, layer.file(rank), extra_keys(reader.model, layer))
    for stored in reader.stored.values():
        weight = reader.weight(stored.spec)
        for place in reader.places[stored.spec.name]:
            master = reader.optimizer_value(stored.spec, MASTER, place.stage)
            if not torch.equal(master.to(reader.dtype), weight):
                where = f"{stored.spec.name} on stage {place.stage}"
                raise CheckpointError(f"{reader.directory}: the optimizer's fp32 copy of {where} is not its weight")
        _check_copies(reader, stored.spec)
    _check_ranks(reader)


def _check_copies(reader: TrainingReader, spec: ParameterSpec) -> None:
    first, *others = reader.places[spec.name]
    for kind in KINDS if others else ():
        expected = reader.optimizer_value(spec, kind, first.stage)
        for place in others:
            if not torch.equal(reader.optimizer_value(spec, kind, place.stage), expected):
                raise CheckpointError(
                    f"{reader.directory}: {kind} of {spec.name} on stage {place.stage} is not that of stage "
                    f"{first.stage}"
                )


def _check_ranks(reader: TrainingReader) -> None:
    """Compare the values that must be equal on all ranks."""
    pipe, data, tensor = reader.state.grid
    model_states, states = reader.model_states(), _common(reader, 0, 0, 0)
    for stage, rank in product(range(pipe), range(tensor)):
        found = reader.model_states(stage, rank)
        for key in ("global_steps", "global_samples", "skipped_steps"):
            if found[key] != model_states[key]:
                name = model_states_file(stage, rank, tensor)
                raise CheckpointError(
                    f"{reader.directory / name} says {key} {found[key]}, rank 0 {model_states[key]}; they must agree"
                )
    for stage, replica, rank in product(range(pipe), range(data), range(tensor)):
        for key, value in _common(reader, stage, replica, rank).items():
            if not same(value, states[key]):
                name = optimizer_file(stage, replica, rank, tensor, bf16=reader.bf16)
                raise CheckpointError(f"{reader.directory / name}: its {key} is not that of rank 0; they must agree")


def _common(reader: TrainingReader, stage: int, data_rank: int, tensor_rank: int) -> dict[str, Any]:
    """Values of an optimizer file that must be equal on all ranks."""
    states = reader.optimizer_states(stage, data_rank, tensor_rank)
    base = reader.base_state(stage, data_rank, tensor_rank)
    scaler = states.get("loss_scaler")
    return {
        "step": [base[group]["step"].float() for group in (0, 1)],
        "param_groups": states["base_optimizer_state"]["param_groups"],
        "clip_grad": states["clip_grad"],
        "loss_scaler": None if scaler is None else vars(scaler),
        "dynamic_loss_scale": states.get("dynamic_loss_scale"),
    }


def _check_order(reader: TrainingReader, stage: int, tensor_rank: int) -> None:
    name = model_states_file(stage, tensor_rank, reader.state.grid[2])
    listed = [list(group.items()) for group in reader.file(name)["param_shapes"]]
    for group, found in zip(reader.groups(stage), listed, strict=True):
        local = [(one.name, one.spec.local_shape(reader.state.grid[2])) for one in group.parameters]
        for expected, got in zip(local, [(key, tuple(shape)) for key, shape in found], strict=False):
            if expected != got:
                raise CheckpointError(f"{reader.directory / name} lists {got}, the model of config.yaml {expected}")
        if len(local) != len(found):
            raise CheckpointError(f"{reader.directory / name} lists {len(found)} parameters instead of {len(local)}")


def _check_keys(reader: TrainingReader, file: str, expected: list[str]) -> None:
    found = set(reader.file(file))
    missing, unknown = [key for key in expected if key not in found], sorted(found - set(expected))
    if missing or unknown:
        what = f"lacks the tensor {missing[0]}" if missing else f"holds {unknown[0]}, which the model does not have"
        raise CheckpointError(f"{reader.directory / file} {what}")
