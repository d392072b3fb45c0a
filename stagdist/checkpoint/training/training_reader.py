"""Read a training checkpoint of any grid, parameter by parameter, under canonical names.

Files are memory-mapped, so only the parameter that is read is in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.text_tokens import TextTokens, check_tokens
from stagdist.checkpoint.training.content import MASTER, Counters
from stagdist.checkpoint.training.directory import CONFIG, STATE, TrainingState, read_state
from stagdist.checkpoint.training.file_structure import structure_problem
from stagdist.checkpoint.training.pickles import load_file
from stagdist.checkpoint.training.stage_files import (
    FlatGroup,
    PartitionPiece,
    StoredParameter,
    flat_groups,
    model_states_file,
    optimizer_file,
    stored_specs,
)
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.errors import CheckpointError
from stagdist.model.precision import DTYPES
from stagdist.parallel.layout import ParameterSpec


@dataclass(frozen=True)
class OptimizerPlace:
    """Where the optimizer values of a parameter are stored on one stage.

    Attributes:
        group: 0 for matrices, 1 for vectors.
        pieces: in the order of the flattened local parameter, the same on every tensor rank.
    """

    stage: int
    group: int
    stored: StoredParameter
    pieces: tuple[PartitionPiece, ...]


class TrainingReader:
    """An open training checkpoint.

    Args:
        directory: contains DeepSpeed's files, `config.yaml` and `state.json`.
        trust_pickle: see `load_file`.

    Raises:
        CheckpointError: configuration or state is missing or damaged, or the grid does not fit the model.
    """

    def __init__(self, directory: str | Path, *, trust_pickle: bool = False):
        self.directory = Path(directory)
        self.config: RunConfig = load_config(self.directory / CONFIG)
        self.state: TrainingState = read_state(self.directory)
        self.model: ModelConfig = self.config.model
        for part, held in vars(self.state.text_tokens).items() if self.state.text_tokens else ():
            check_tokens(held, f"{self.directory / STATE}: text_tokens.{part}", self.model.vocab_size)
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
        """The special tokens of the model directory that the run started from; None if there was none."""
        return self.state.text_tokens

    def file(self, name: str) -> Any:
        """Content of one of DeepSpeed's files, opened once.

        Raises:
            CheckpointError: it cannot be read, or does not have the structure of DeepSpeed's files.
        """
        if name not in self._files:
            content = load_file(self.directory / name, trust_pickle=self._trust_pickle)
            problem = structure_problem(name, content)
            if problem is not None:
                raise CheckpointError(f"{self.directory / name} {problem}; get the checkpoint from its source again")
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
        """One global parameter in the dtype of the run; `section_mix` is joined from its parts."""
        if spec.name == "section_mix":
            return torch.cat([self.weight(part) for part in self._mix_parts])
        stored = self.stored[spec.name]
        ranks = range(1 if spec.shard_dim is None else self.state.grid[2])
        return self._join(spec, [self.layer_tensor(stored, rank) for rank in ranks], stored.key)

    def optimizer_value(self, spec: ParameterSpec, kind: str, stage: int | None = None) -> Tensor:
        """The fp32 copy or a moment of a global parameter.

        Args:
            kind: one of `KINDS`.
            stage: the stage whose copy is read; None for the first that has one.
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
        """Every copy of a parameter with its location. Parameters that are not split have one on each tensor rank."""
        if spec.shard_dim is not None:
            yield "", self.weight(spec)
            return
        for rank in range(self.state.grid[2]):
            yield f" on tensor rank {rank}", self.layer_tensor(self.stored[spec.name], rank)

    def optimizer_copies(self, spec: ParameterSpec, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every copy of an optimizer value with its location: on each stage that has it, else as `weight_copies`."""
        for place in self.places[spec.name]:
            if spec.shard_dim is not None:
                yield f" on stage {place.stage}", self.optimizer_value(spec, kind, place.stage)
                continue
            for rank in range(self.state.grid[2]):
                value = self._assemble(place, kind, rank).reshape(spec.shape)
                yield f" on stage {place.stage}, tensor rank {rank}", value

    def steps(self, stage: int = 0) -> Tensor:
        """Number of Adam updates, a scalar."""
        return torch.as_tensor(self.base_state(stage, 0, 0)[0]["step"], dtype=torch.float32)

    def counters(self) -> Counters:
        """The values that DeepSpeed stores in addition to tensors."""
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
        """Generators of a rank; those of the first rank if this grid has no such rank."""
        pipe, _, tensor = self.state.grid
        states = self.model_states(*((stage, tensor_rank) if stage < pipe and tensor_rank < tensor else (0, 0)))
        return {key: states[key] for key in ("cpu_random_state", "cuda_random_state") if key in states}

    @cached_property
    def places(self) -> dict[str, list[OptimizerPlace]]:
        """Where the optimizer values of every parameter are stored, one entry for each stage that has it."""
        found: dict[str, list[OptimizerPlace]] = {}
        for stage in range(self.state.grid[0]):
            for group, flat in enumerate(self.groups(stage)):
                for stored, pieces in flat.pieces():
                    found.setdefault(stored.spec.name, []).append(OptimizerPlace(stage, group, stored, tuple(pieces)))
        return found

    def groups(self, stage: int) -> tuple[FlatGroup, FlatGroup]:
        """The flat groups of a stage."""
        return flat_groups(self.model, self.state.grid, stage)

    def layer_tensor(self, stored: StoredParameter, tensor_rank: int) -> Tensor:
        """The weight of a parameter on one tensor rank.

        Raises:
            CheckpointError: it is missing, or has another shape or dtype.
        """
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
        joined = slices[0] if len(slices) == 1 else torch.cat(slices, dim=spec.shard_dim or 0)
        if spec.vocabulary and len(joined) > spec.shape[0]:
            if bool(joined[spec.shape[0] :].any()):
                raise CheckpointError(f"{self.directory}: {what} is not zero in the padding of the vocabulary")
            joined = joined[: spec.shape[0]]
        return joined

    def _assemble(self, place: OptimizerPlace, kind: str, tensor_rank: int) -> Tensor:
        parts = []
        for piece in place.pieces:
            flat = self._partition(place.stage, piece.data_rank, tensor_rank, kind, place.group)
            parts.append(flat.narrow(0, piece.start, piece.length))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _partition(self, stage: int, data_rank: int, tensor_rank: int, kind: str, group: int) -> Tensor:
        """The flat tensor of one rank; its length is checked."""
        if kind == MASTER:
            flat = self.optimizer_states(stage, data_rank, tensor_rank)["single_partition_of_fp32_groups"][group]
        else:
            flat = self.base_state(stage, data_rank, tensor_rank)[group][kind]
        layout = self.groups(stage)[group]
        lean = layout.partition_size - layout.padding(data_rank)
        if flat.dtype != torch.float32 or flat.numel() not in (lean, layout.partition_size):
            name = optimizer_file(stage, data_rank, tensor_rank, self.state.grid[2], bf16=self.bf16)
            raise CheckpointError(
                f"{self.directory / name}: {kind} of group {group} is {flat.dtype} with {flat.numel()} values, the "
                f"grid asks float32 with {layout.partition_size}"
            )
        return flat.detach()

    def base_state(self, stage: int, data_rank: int, tensor_rank: int) -> dict[int, dict[str, Any]]:
        """Step and moments of both groups of one rank.

        Raises:
            CheckpointError: no step was done.
        """
        base: dict[int, dict[str, Any]] = self.optimizer_states(stage, data_rank, tensor_rank)["base_optimizer_state"][
            "state"
        ]
        if len(base) != 2:
            raise CheckpointError(f"{self.directory} has no optimizer state: no step was done before it was saved")
        return base

    @cached_property
    def _mix_parts(self) -> list[ParameterSpec]:
        return [spec for spec in stored_specs(self.model) if spec.name.startswith("section_mix.")]

    @cached_property
    def stored(self) -> dict[str, StoredParameter]:
        """Where the weight of every parameter is stored, by canonical name."""
        found: dict[str, StoredParameter] = {}
        for places in self.places.values():
            found.setdefault(places[0].stored.spec.name, places[0].stored)
        return found

    def specs(self) -> Iterator[ParameterSpec]:
        """All parameters, `section_mix` in parts."""
        return iter(stored_specs(self.model))
