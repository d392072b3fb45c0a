"""A training checkpoint read parameter by parameter under canonical names, whatever grid wrote it.

Files are memory-mapped, so only the parameter at hand is ever held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.pickles import load_file
from stagdist.checkpoint.stage_layout import (
    FlatGroup,
    Piece,
    StoredParameter,
    extra_keys,
    flat_groups,
    model_states_file,
    optimizer_file,
    pipeline_layers,
    stored_specs,
)
from stagdist.checkpoint.training_directory import CONFIG, TrainingState, damage, read_complete, read_state
from stagdist.checkpoint.training_source import DTYPES, MASTER, Counters
from stagdist.config import ModelConfig, RunConfig
from stagdist.config_loading import load_config
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import ParameterSpec


@dataclass(frozen=True)
class Place:
    """Where a parameter's optimizer values lie on one stage.

    Attributes:
        group: 0 for matrices, 1 for vectors.
        pieces: in the order of the flattened local parameter, the same on every tensor rank.
    """

    stage: int
    group: int
    stored: StoredParameter
    pieces: tuple[Piece, ...]


class TrainingReader:
    """An open training checkpoint.

    Args:
        directory: holds DeepSpeed's files, `config.yaml` and `state.json`.
        trust_pickle: see `load_file`.

    Raises:
        CheckpointError: the configuration or the state is missing or damaged, or the grid does not fit the model.
    """

    def __init__(self, directory: str | Path, *, trust_pickle: bool = False):
        self.directory = Path(directory)
        self.config: RunConfig = load_config(self.directory / CONFIG)
        self.state: TrainingState = read_state(self.directory)
        self.model: ModelConfig = self.config.model
        self.dtype = DTYPES[self.config.training.precision]
        self._trust_pickle = trust_pickle
        self._files: dict[str, Any] = {}
        pipe = self.state.grid[0]
        if self.model.num_sections % pipe:
            raise CheckpointError(
                f"{self.directory}: state.json says {pipe} stages, config.yaml {self.model.num_sections} sections"
            )

    @property
    def bf16(self) -> bool:
        """Whether DeepSpeed's bf16 optimizer wrote it."""
        return self.dtype == torch.bfloat16

    def check_files(self) -> None:
        """Compare every file with its record.

        Raises:
            CheckpointError: a file is missing or was changed, by name.
        """
        records = read_complete(self.directory)
        reason = damage(self.directory, sorted(records), records)
        if reason is not None:
            raise CheckpointError(f"{self.directory}: {reason}")

    def file(self, name: str) -> Any:
        """Content of one of DeepSpeed's files, opened once."""
        if name not in self._files:
            self._files[name] = load_file(self.directory / name, trust_pickle=self._trust_pickle)
        return self._files[name]

    def model_states(self, stage: int = 0, tensor_rank: int = 0) -> dict[str, Any]:
        """Counters and generators of one stage and tensor rank."""
        states: dict[str, Any] = self.file(model_states_file(stage, tensor_rank, self.state.grid[2]))
        return states

    def optimizer_states(self, stage: int = 0, data_rank: int = 0, tensor_rank: int = 0) -> dict[str, Any]:
        """DeepSpeed's optimizer dictionary of one rank."""
        name = optimizer_file(stage, data_rank, tensor_rank, self.state.grid[2], bf16=self.bf16)
        states: dict[str, Any] = self.file(name)["optimizer_state_dict"]
        return states

    def weight(self, spec: ParameterSpec) -> Tensor:
        """A whole parameter in the type of the run; `section_mix` too comes whole."""
        if spec.name == "section_mix":
            return torch.cat([self.weight(part) for part in self._mix_parts])
        stored = self._stored[spec.name]
        ranks = range(1 if spec.shard_dim is None else self.state.grid[2])
        return self._join(spec, [self._layer_tensor(stored, rank) for rank in ranks], stored.key)

    def optimizer_value(self, spec: ParameterSpec, kind: str, stage: int | None = None) -> Tensor:
        """The fp32 copy or a moment of a whole parameter.

        Args:
            kind: one of `KINDS`.
            stage: the stage whose copy is meant; the first that has one unless given.
        """
        if spec.name == "section_mix":
            return torch.cat([self.optimizer_value(part, kind) for part in self._mix_parts])
        places = self.places[spec.name]
        place = places[0] if stage is None else next(one for one in places if one.stage == stage)
        ranks = range(1 if spec.shard_dim is None else self.state.grid[2])
        shape = spec.local_shape(self.state.grid[2])
        slices = [self._assemble(place, kind, rank).reshape(shape) for rank in ranks]
        return self._join(spec, slices, f"{kind} of {spec.name}")

    def steps(self, stage: int = 0) -> Tensor:
        """Updates that Adam has done, a scalar."""
        return torch.as_tensor(self._base_state(stage, 0, 0)[0]["step"], dtype=torch.float32)

    def counters(self) -> Counters:
        """What DeepSpeed keeps besides tensors."""
        states, optimizer = self.model_states(), self.optimizer_states()
        return Counters(
            global_steps=states["global_steps"],
            global_samples=states["global_samples"],
            skipped_steps=states["skipped_steps"],
            param_groups=optimizer["base_optimizer_state"]["param_groups"],
            clip_grad=optimizer["clip_grad"],
            loss_scaler=dict(vars(optimizer["loss_scaler"])) if "loss_scaler" in optimizer else {},
            dynamic_loss_scale=optimizer.get("dynamic_loss_scale", False),
            random=self._random,
        )

    def _random(self, stage: int, tensor_rank: int) -> dict[str, Tensor]:
        """Generators of a rank; those of the first rank where this grid has no such place."""
        pipe, _, tensor = self.state.grid
        states = self.model_states(*((stage, tensor_rank) if stage < pipe and tensor_rank < tensor else (0, 0)))
        return {key: states[key] for key in ("cpu_random_state", "cuda_random_state") if key in states}

    @cached_property
    def places(self) -> dict[str, list[Place]]:
        """Every place of every parameter's optimizer values, one per stage that holds it."""
        found: dict[str, list[Place]] = {}
        for stage in range(self.state.grid[0]):
            for group, flat in enumerate(self.groups(stage)):
                for stored, pieces in flat.pieces():
                    found.setdefault(stored.spec.name, []).append(Place(stage, group, stored, tuple(pieces)))
        return found

    def groups(self, stage: int) -> tuple[FlatGroup, FlatGroup]:
        """The flat groups of a stage, checked against what the files say."""
        return flat_groups(self.model, self.state.grid, stage)

    def check_layout(self) -> None:
        """Compare names, shapes, types and sizes of everything stored with what the model asks for.

        The weights must be the rounded fp32 copies, on every stage that has one: a partition that was cut at another
        place than this module believes would show here.

        Raises:
            CheckpointError: by name, where a file holds something else.
        """
        for stage in range(self.state.grid[0]):
            for rank in range(self.state.grid[2]):
                self._check_order(stage, rank)
        for layer in pipeline_layers(self.model):
            if layer.first:
                for rank in range(self.state.grid[2]):
                    self._check_keys(layer.file(rank), extra_keys(self.model, layer))
        for stored in self._stored.values():
            weight = self.weight(stored.spec)
            for place in self.places[stored.spec.name]:
                master = self.optimizer_value(stored.spec, MASTER, place.stage)
                if not torch.equal(master.to(self.dtype), weight):
                    where = f"{stored.spec.name} on stage {place.stage}"
                    raise CheckpointError(f"{self.directory}: the optimizer's fp32 copy of {where} is not its weight")

    def _check_order(self, stage: int, tensor_rank: int) -> None:
        name = model_states_file(stage, tensor_rank, self.state.grid[2])
        listed = [list(group.items()) for group in self.file(name)["param_shapes"]]
        for group, found in zip(self.groups(stage), listed, strict=True):
            local = [(one.name, one.spec.local_shape(self.state.grid[2])) for one in group.parameters]
            for expected, got in zip(local, [(key, tuple(shape)) for key, shape in found], strict=False):
                if expected != got:
                    raise CheckpointError(f"{self.directory / name} lists {got}, the model of config.yaml {expected}")
            if len(local) != len(found):
                raise CheckpointError(f"{self.directory / name} lists {len(found)} parameters instead of {len(local)}")

    def _check_keys(self, file: str, expected: list[str]) -> None:
        found = set(self.file(file))
        missing, unknown = [key for key in expected if key not in found], sorted(found - set(expected))
        if missing or unknown:
            what = f"lacks the tensor {missing[0]}" if missing else f"holds {unknown[0]}, which the model does not have"
            raise CheckpointError(f"{self.directory / file} {what}")

    def _layer_tensor(self, stored: StoredParameter, tensor_rank: int) -> Tensor:
        file = stored.layer.file(tensor_rank)
        tensor = self.file(file).get(stored.key)
        shape = stored.spec.local_shape(self.state.grid[2])
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{self.directory / file} lacks the tensor {stored.key}")
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
            raise CheckpointError(
                f"{stored.key} in {self.directory / file} is {list(tensor.shape)} {tensor.dtype}, the model of "
                f"config.yaml asks {list(shape)} {self.dtype}"
            )
        return tensor

    def _join(self, spec: ParameterSpec, slices: list[Tensor], what: str) -> Tensor:
        whole = slices[0] if len(slices) == 1 else torch.cat(slices, dim=spec.shard_dim or 0)
        if spec.vocabulary and len(whole) > spec.shape[0]:
            if bool(whole[spec.shape[0] :].any()):
                raise CheckpointError(f"{self.directory}: {what} is not zero in the padding of the vocabulary")
            whole = whole[: spec.shape[0]]
        return whole

    def _assemble(self, place: Place, kind: str, tensor_rank: int) -> Tensor:
        parts = []
        for piece in place.pieces:
            flat = self._partition(place.stage, piece.data_rank, tensor_rank, kind, place.group)
            parts.append(flat.narrow(0, piece.start, piece.length))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _partition(self, stage: int, data_rank: int, tensor_rank: int, kind: str, group: int) -> Tensor:
        """One rank's flat tensor, checked to be as long as the layout says."""
        if kind == MASTER:
            flat = self.optimizer_states(stage, data_rank, tensor_rank)["single_partition_of_fp32_groups"][group]
        else:
            flat = self._base_state(stage, data_rank, tensor_rank)[group][kind]
        layout = self.groups(stage)[group]
        lean = layout.partition_size - layout.padding(data_rank)
        if flat.dtype != torch.float32 or flat.numel() not in (lean, layout.partition_size):
            name = optimizer_file(stage, data_rank, tensor_rank, self.state.grid[2], bf16=self.bf16)
            raise CheckpointError(
                f"{self.directory / name}: {kind} of group {group} is {flat.dtype} with {flat.numel()} values, the "
                f"grid asks float32 with {layout.partition_size}"
            )
        return flat.detach()

    def _base_state(self, stage: int, data_rank: int, tensor_rank: int) -> dict[int, dict[str, Any]]:
        base: dict[int, dict[str, Any]] = self.optimizer_states(stage, data_rank, tensor_rank)["base_optimizer_state"][
            "state"
        ]
        if len(base) != 2:
            raise CheckpointError(
                f"{self.directory} holds no state of the optimizer: no step was done before it was saved"
            )
        return base

    @cached_property
    def _mix_parts(self) -> list[ParameterSpec]:
        return [spec for spec in stored_specs(self.model) if spec.name.startswith("section_mix.")]

    @cached_property
    def _stored(self) -> dict[str, StoredParameter]:
        found: dict[str, StoredParameter] = {}
        for places in self.places.values():
            found.setdefault(places[0].stored.spec.name, places[0].stored)
        return found

    def specs(self) -> Iterator[ParameterSpec]:
        """Every parameter, `section_mix` in parts."""
        return iter(stored_specs(self.model))
