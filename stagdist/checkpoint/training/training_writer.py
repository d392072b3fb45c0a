"""Write a training checkpoint for any grid, in exactly the files that DeepSpeed would write.

The files of all ranks are written one after the other from global parameters, so the grid of the source does not
matter. The engine of DeepSpeed loads the result like its own checkpoint.
"""

import errno
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stagdist.checkpoint.training.content import KINDS, MASTER, MOMENTS, Track, TrainingSource, untracked
from stagdist.checkpoint.training.stage_files import (
    FlatGroup,
    PipelineLayer,
    extra_keys,
    flat_groups,
    layer_parameters,
    model_states_file,
    optimizer_file,
    pipeline_layers,
)
from stagdist.config.run_config import RunConfig
from stagdist.files import FileRecord, file_record
from stagdist.model.initialization import local_slice
from stagdist.model.precision import DTYPES
from stagdist.parallel.grid import Grid

NEARLY_FULL_BYTES = 1 << 27
"""A write that failed on a disk with less than this left is reported as a full disk."""

SMALL_SCRATCH_BYTES = 1 << 20
"""Tensors up to this size stay in ordinary memory."""


class TrainingWriter:
    """Writes DeepSpeed's files of a grid into a folder.

    Args:
        source: the values to write.
        config: configuration of the run.
        grid: the grid to write for.
        folder: an existing folder.
    """

    def __init__(self, source: TrainingSource, config: RunConfig, grid: Grid, folder: Path):
        self._source, self._config, self._grid, self._folder = source, config, grid, folder
        self._model, self._dtype = config.model, DTYPES[config.training.precision]
        self._bf16 = self._dtype == torch.bfloat16
        self._counters = source.counters()
        self._scratch = Scratch(folder)
        self._types = _deepspeed()
        self._records: dict[str, FileRecord] = {}

    def write(self, track: Track[Any] = untracked) -> dict[str, FileRecord]:
        """Write all files and wait until they have reached the disk.

        Returns: size and hash of each file.
        """
        ranks = range(self._grid.tensor)
        layers = [layer for layer in pipeline_layers(self._model) if layer.first]
        jobs: list[Callable[[], None]] = [partial(self._write_layer, layer, rank) for layer in layers for rank in ranks]
        for stage in range(self._grid.pipe):
            for rank in ranks:
                jobs += [partial(self._write_model_states, stage, rank), partial(self._write_optimizer, stage, rank)]
        for job in track(jobs, "writing"):
            job()
        return self._records

    def _save(self, content: Any, name: str) -> None:
        try:
            torch.save(content, self._folder / name)
            self._records[name] = file_record(self._folder / name, sync=True)
        except RuntimeError as error:  # torch reports a failed write without its reason
            full = shutil.disk_usage(self._folder).free < NEARLY_FULL_BYTES
            reason = errno.ENOSPC if full else errno.EIO
            raise OSError(reason, os.strerror(reason), str(self._folder / name)) from error

    def _write_layer(self, layer: PipelineLayer, tensor_rank: int) -> None:
        specs = {stored.key: stored.spec for stored in layer_parameters(self._model, layer)}
        content: OrderedDict[str, Tensor | None] = OrderedDict()
        for key in extra_keys(self._model, layer):
            content[key] = None
            if key in specs:
                local = local_slice(self._source.weight(specs[key]), specs[key], tensor_rank, self._grid.tensor)
                content[key] = self._scratch.copy(local.to(self._dtype))
        self._save(content, layer.file(tensor_rank))

    def _write_model_states(self, stage: int, tensor_rank: int) -> None:
        groups = flat_groups(self._model, self._sizes, stage)
        counters = self._counters
        content = {
            "module": None,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [
                OrderedDict((one.name, torch.Size(one.spec.local_shape(self._grid.tensor))) for one in group.parameters)
                for group in groups
            ],
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": counters.skipped_steps,
            "global_steps": counters.global_steps,
            "global_samples": counters.global_samples,
            "dp_world_size": self._grid.data,
            "mp_world_size": self._grid.pipe * self._grid.tensor,
            "checkpoint_parallel_dimensions": {"pp_degree": self._grid.pipe, "tp_degree": self._grid.tensor},
            "ds_config": self._settings(),
            "ds_version": self._types.version,
            **counters.random(stage, tensor_rank),
        }
        self._save(content, model_states_file(stage, tensor_rank, self._grid.tensor))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self._grid.pipe, self._grid.data, self._grid.tensor

    def _settings(self) -> dict[str, Any]:
        """The batch sizes of DeepSpeed's configuration; the run computes the rest when it starts."""
        training = self._config.training
        return {
            "train_batch_size": training.global_batch_size,
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": training.num_micro_batches(self._grid.data),
            "zero_optimization": {"stage": 1},
        }

    def _write_optimizer(self, stage: int, tensor_rank: int) -> None:
        groups = flat_groups(self._model, self._sizes, stage)
        flat = {(kind, index): self._flatten(group, kind, tensor_rank) for index, group in enumerate(groups)
                for kind in KINDS}  # fmt: skip
        for data_rank in range(self._grid.data):
            mine = {place: partitions[data_rank] for place, partitions in flat.items()}
            content = {
                "optimizer_state_dict": self._optimizer_dictionary(groups, mine, data_rank),
                "ds_config": self._settings(),
                "ds_version": self._types.version,
            }
            self._save(content, optimizer_file(stage, data_rank, tensor_rank, self._grid.tensor, bf16=self._bf16))

    def _flatten(self, group: FlatGroup, kind: str, tensor_rank: int) -> list[Tensor]:
        """One flat tensor for each data rank."""
        partitions = [self._scratch.zeros((group.partition_size,), torch.float32) for _ in range(self._grid.data)]
        for stored, pieces in group.pieces():
            value = self._source.optimizer_value(stored.spec, kind)
            local = local_slice(value, stored.spec, tensor_rank, self._grid.tensor)
            values = local.contiguous().flatten()
            for piece in pieces:
                target = partitions[piece.data_rank].narrow(0, piece.start, piece.length)
                target.copy_(values.narrow(0, piece.offset, piece.length))
        return partitions

    def _optimizer_dictionary(
        self, groups: Sequence[FlatGroup], flat: dict[tuple[str, int], Tensor], data_rank: int
    ) -> dict[str, Any]:
        """The state as DeepSpeed's optimizer stores it; only the bf16 optimizer stores the padding of the masters."""
        state = {
            index: {"step": self._source.steps().clone(), **{kind: flat[kind, index] for kind in MOMENTS}}
            for index in range(len(groups))
        }
        masters = []
        for index, group in enumerate(groups):
            master, padding = flat[MASTER, index], group.padding(data_rank)
            masters.append((master if self._bf16 else master[: master.numel() - padding]).requires_grad_())
        base = {"state": state, "param_groups": self._counters.param_groups}
        content: dict[str, Any] = {} if self._bf16 else self._scaling()
        content |= {
            "clip_grad": self._counters.clip_grad,
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": masters,
        }
        if not self._bf16:
            content["zero_stage"] = self._types.zero_stage.optimizer_states
        content["group_paddings"] = [self._padding(group, data_rank) for group in groups]
        if not self._bf16:
            content["param_alignment_paddings"] = [[0] * len(group.parameters) for group in groups]
        return content | {
            "partition_count": [self._grid.data] * len(groups),
            "ds_version": self._types.version,
            "param_slice_mappings": [self._fragments(group, data_rank) for group in groups],
        }

    def _padding(self, group: FlatGroup, data_rank: int) -> int:
        if not self._bf16:
            return group.padding(data_rank)
        last = data_rank == self._grid.data - 1
        return group.partition_size * self._grid.data - group.size if last else 0

    def _scaling(self) -> dict[str, Any]:
        dynamic = self._counters.dynamic_loss_scale
        kind = self._types.dynamic_loss_scaler if dynamic else self._types.loss_scaler
        scaler = kind.__new__(kind)
        scaler.__dict__.update(self._counters.loss_scaler)
        return {"loss_scaler": scaler, "dynamic_loss_scale": dynamic, "overflow": False}

    def _fragments(self, group: FlatGroup, data_rank: int) -> OrderedDict[str, Any]:
        """The range of every parameter inside this rank's partition."""
        return OrderedDict(
            (stored.name, self._types.fragment(numel=piece.length, start=piece.start))
            for stored, pieces in group.pieces()
            for piece in pieces
            if piece.data_rank == data_rank
        )


class Scratch:
    """Creates tensors whose memory is a deleted file, so that a large checkpoint does not need the memory.

    Args:
        folder: a folder on the file system of the result, which has enough space.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        count = prod(shape)
        size = count * torch.empty((), dtype=dtype).element_size()
        if size <= SMALL_SCRATCH_BYTES:
            return torch.zeros(tuple(shape), dtype=dtype)
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=".scratch-")
        try:
            os.posix_fallocate(descriptor, 0, size)  # a full disk must be an error here, not a crash at a later write
            return torch.from_file(name, shared=True, size=count, dtype=dtype).reshape(tuple(shape))
        finally:
            os.close(descriptor)
            os.unlink(name)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor."""
        target = self.zeros(tensor.shape, tensor.dtype)
        target.copy_(tensor)
        return target


def _deepspeed() -> "_Types":
    """DeepSpeed's types. They are imported here because the import takes seconds and only writing needs them."""
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return _Types(deepspeed.__version__, fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler)


class _Types(NamedTuple):
    version: str
    fragment: Any
    zero_stage: Any
    loss_scaler: Any
    dynamic_loss_scaler: Any
