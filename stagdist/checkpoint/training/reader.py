"""A training checkpoint read parameter by parameter under canonical names, whatever grid wrote it.

Files are memory-mapped, so only the parameter at hand is ever held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.checkpoint.training.content import KINDS, MASTER, Counters
from stagdist.checkpoint.training.directory import CONFIG, TrainingState, checkpoint_damage, read_state
from stagdist.checkpoint.training.file_structure import same, structure_problem
from stagdist.checkpoint.training.pickles import load_file
from stagdist.checkpoint.training.stage_files import (
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
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError
from stagdist.model.precision import DTYPES
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

    @property
    def tokens(self) -> TextTokens | None:
        """Those of the model directory that the run began from, if it did."""
        return self.state.text_tokens

    def check_files(self) -> None:
        """Compare every file that model and grid have with its record.

        Raises:
            CheckpointError: a file or its record is missing, or it was changed, by name.
        """
        reason = checkpoint_damage(self.directory)
        if reason is not None:
            raise CheckpointError(f"{self.directory}: {reason}")

    def file(self, name: str) -> Any:
        """Content of one of DeepSpeed's files, opened once.

        Raises:
            CheckpointError: it cannot be read, or is not built as DeepSpeed builds it.
        """
        if name not in self._files:
            content = load_file(self.directory / name, trust_pickle=self._trust_pickle)
            problem = structure_problem(name, content)
            if problem is not None:
                raise CheckpointError(
                    f"{self.directory / name} {problem}; take the checkpoint from where it came again"
                )
            self._files[name] = content
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

    def weight_copies(self, spec: ParameterSpec) -> Iterator[tuple[str, Tensor]]:
        """Every copy of a parameter, with where it lies: what is not split has one on each tensor rank."""
        if spec.shard_dim is not None:
            yield "", self.weight(spec)
            return
        for rank in range(self.state.grid[2]):
            yield f" on tensor rank {rank}", self._layer_tensor(self._stored[spec.name], rank)

    def optimizer_copies(self, spec: ParameterSpec, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every copy of an optimizer's value, with where it lies: on each stage that has it, else as above."""
        for place in self.places[spec.name]:
            if spec.shard_dim is not None:
                yield f" on stage {place.stage}", self.optimizer_value(spec, kind, place.stage)
                continue
            for rank in range(self.state.grid[2]):
                yield (
                    f" on stage {place.stage}, tensor rank {rank}",
                    self._assemble(place, kind, rank).reshape(spec.shape),
                )

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
        place than this module believes would show here. Copies on later stages must have the moments of the first,
        and all ranks the same step, counters and settings, since one of them stands for all.

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
            self._check_copies(stored.spec)
        self._check_ranks()

    def _check_copies(self, spec: ParameterSpec) -> None:
        first, *others = self.places[spec.name]
        for kind in KINDS if others else ():
            expected = self.optimizer_value(spec, kind, first.stage)
            for place in others:
                if not torch.equal(self.optimizer_value(spec, kind, place.stage), expected):
                    raise CheckpointError(
                        f"{self.directory}: {kind} of {spec.name} on stage {place.stage} is not that of stage "
                        f"{first.stage}"
                    )

    def _check_ranks(self) -> None:
        """What every rank says alike."""
        pipe, data, tensor = self.state.grid
        model_states, states = self.model_states(), self._common(0, 0, 0)
        for stage, rank in product(range(pipe), range(tensor)):
            found = self.model_states(stage, rank)
            for key in ("global_steps", "global_samples", "skipped_steps"):
                if found[key] != model_states[key]:
                    name = model_states_file(stage, rank, tensor)
                    raise CheckpointError(
                        f"{self.directory / name} says {key} {found[key]}, rank 0 {model_states[key]}; they must agree"
                    )
        for stage, replica, rank in product(range(pipe), range(data), range(tensor)):
            for key, value in self._common(stage, replica, rank).items():
                if not same(value, states[key]):
                    name = optimizer_file(stage, replica, rank, tensor, bf16=self.bf16)
                    raise CheckpointError(f"{self.directory / name}: its {key} is not that of rank 0; they must agree")

    def _common(self, stage: int, data_rank: int, tensor_rank: int) -> dict[str, Any]:
        """What an optimizer's file says besides the values of its own parameters."""
        states = self.optimizer_states(stage, data_rank, tensor_rank)
        base = self._base_state(stage, data_rank, tensor_rank)
        scaler = states.get("loss_scaler")
        return {
            "step": [base[group]["step"].float() for group in (0, 1)],
            "param_groups": states["base_optimizer_state"]["param_groups"],
            "clip_grad": states["clip_grad"],
            "loss_scaler": None if scaler is None else vars(scaler),
            "dynamic_loss_scale": states.get("dynamic_loss_scale"),
        }

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
