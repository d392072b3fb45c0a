"""The state of the engine as fragments of global tensors, and back."""

import base64
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.checkpoint.training.index import MOMENTS, VALUE, Box, Fragment, box_numel
from stagdist.checkpoint.training.reader import TrainingReader, stored_box
from stagdist.checkpoint.training.writer import OwnedFragment
from stagdist.config.parts import ModelConfig
from stagdist.parallel.groups import Groups
from stagdist.parallel.layout import ParameterSpec, model_parameters, owning_stage
from stagdist.training.engine.deepspeed_adapter import owned_part
from stagdist.training.engine.section_engine import SectionEngine


@torch.no_grad()  # the optimizer changes the values in place, of which views with gradients cannot be taken
def stored_fragments(engine: SectionEngine, groups: Groups, model: ModelConfig, file: str) -> list[OwnedFragment]:
    """What this rank stores: views of the optimizer's values and moments that ZeRO-1 gave to it.

    Of copies on several stages the first stage stores, of copies on several tensor ranks the first rank.

    Args:
        file: name of the file that they will be in.
    """
    fragments, place = [], groups.place
    for name, parameter, spec, box in _parameters(engine, groups, model):
        part = owned_part(parameter)
        copy = place.pipe != owning_stage(name, model, groups.grid.pipe) or (
            spec.shard_dim is None and place.tensor > 0
        )
        if part is None or copy or part.start >= box_numel(box):
            continue
        stop = min(part.stop, box_numel(box))  # what follows is padding of the vocabulary
        state = engine.moments(part.group)
        tensors = {VALUE: part.value} | {kind: state[kind][part.flat] for kind in MOMENTS if kind in state}
        fragment = Fragment(file=file, key=name, box=box, range=(part.start, stop))
        fragments.append(
            OwnedFragment(spec.name, fragment, {kind: held[: fragment.numel] for kind, held in tensors.items()})
        )
    return fragments


@torch.no_grad()
def load_tensors(engine: SectionEngine, groups: Groups, model: ModelConfig, reader: TrainingReader) -> None:
    """Fill the weights of this rank, and what it owns of the optimizer's values and moments.

    Raises:
        CheckpointError: a file does not hold what the index says.
    """
    steps = reader.state.optimizer_steps
    if steps:
        engine.begin_moments(steps)
    for _, parameter, spec, box in _parameters(engine, groups, model):
        values = torch.zeros(parameter.numel())
        stored = box_numel(box)
        reader.fill(values[:stored], spec.name, VALUE, box)
        parameter.copy_(values.view_as(parameter))
        part = owned_part(parameter)
        if part is None:
            continue
        part.value.copy_(values[part.start : part.stop])
        moments = engine.moments(part.group)
        for kind in MOMENTS if steps else ():
            mine = values[: part.stop - part.start].zero_()
            reader.fill(mine[: max(stored - part.start, 0)], spec.name, kind, box, part.start)
            moments[kind][part.flat].copy_(mine)


def _parameters(
    engine: SectionEngine, groups: Groups, model: ModelConfig
) -> Iterator[tuple[str, nn.Parameter, ParameterSpec, Box]]:
    """This rank's parameters: name, values, global tensor, and the part of it that the rank holds."""
    specs = {spec.name: spec for spec in model_parameters(model)}
    for name, parameter in engine.module.canonical_parameters().items():
        if name.startswith("section_mix."):
            section = int(name.rsplit(".", 1)[1])
            yield name, parameter, specs["section_mix"], ((section, section + 1),)
        else:
            yield name, parameter, specs[name], stored_box(specs[name], groups.place.tensor, groups.grid.tensor)


def optimizer_steps(engine: SectionEngine) -> int:
    """Number of updates that Adam's moments have seen."""
    return int(engine.moments(0).get("step", torch.zeros(())))


def generator_states() -> dict[str, str]:
    """States of torch's generators, by device. Training draws no random numbers yet."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(bytes(state.numpy())).decode() for device, state in states.items()}


def restore_generators(state: TrainingState, groups: Groups) -> None:
    """Restore this rank's generators. On another number of stages or tensor ranks they keep their own state."""
    pipe, _, tensor = state.grid
    if (pipe, tensor) != (groups.grid.pipe, groups.grid.tensor) or len(state.generators) != pipe * tensor:
        return
    states = state.generators[groups.place.pipe * tensor + groups.place.tensor]
    torch.set_rng_state(_bytes(states["cpu"]))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
